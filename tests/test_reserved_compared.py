"""Reserved rows beside the base: the same answers, token for token, and figures of the prompts that they name."""

import shutil

import pytest
import transformers
from conftest import PAIRS, tiny_llama
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

from ksl_patch.train.build import Build
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.progress import SilentReporter


def sentencepiece(folder, **kind):
    """A base whose tokenizer puts a space before a text, and before what follows a special token, as Llama 2's does."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    texts = [text for pair in PAIRS for text in pair]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    made.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_tokens([f"fill{i}" for i in range(400 - len(tokenizer))])
    tokenizer.add_tokens([AddedToken(f"<|placeholder{i}|>", special=True, normalized=False, **kind) for i in range(8)])
    model = tiny_llama(vocab_size=416)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def made(base, pairs_file, run, **changes):
    settings = {
        "base": str(base), "pairs": str(pairs_file), "language": "es", "name": "es", "alpha": None, "top_k": 3,
        "selection": "reserved", "template": "soft", "steps": 2, "batch_size": 2, "dev": 4, "held_out": 4,
    }  # fmt: skip
    return Build(BuildConfig(**settings | changes), run, SilentReporter())


@pytest.mark.parametrize("template", ["soft", "plain", "{source}\nSpanish:{reserved}"])
@pytest.mark.parametrize("kind", [{}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
@pytest.mark.parametrize("tokens", ["sentencepiece", "byte level"])
def test_losses_are_of_the_same_tokens_as_the_base_s(tmp_path, reserved_folder, pairs_file, tokens, kind, template):
    if tokens == "sentencepiece":
        sentencepiece(tmp_path / "base", **kind)
    else:
        shutil.copytree(reserved_folder, tmp_path / "base")
        tokenizer = transformers.AutoTokenizer.from_pretrained(reserved_folder)
        state = tokenizer.backend_tokenizer.to_str()
        for name, value in kind.items():
            state = state.replace(f'"{name}":{str(not value).lower()}', f'"{name}":{str(value).lower()}')
        again = transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(state), bos_token="<s>", eos_token="</s>", pad_token=tokenizer.pad_token
        )
        again.save_pretrained(tmp_path / "base")
    build = made(tmp_path / "base", pairs_file, tmp_path / "run", template=template)
    own, base = build.held_out, build.of_base(build.held_out)
    assert own.template != base.template
    for ours, theirs, pair in zip(own.examples, base.examples, own.pairs, strict=True):
        assert ours.answer == theirs.answer
        assert ours.prompt != theirs.prompt
        assert build.tokenizer.decode(ours.answer, skip_special_tokens=True).strip() == pair.target


def test_the_base_s_loss_is_of_the_prompt_that_names_the_languages(tmp_path, reserved_folder, pairs_file):
    """Another source language is another prompt of the base's, though the patch's has no words."""
    english, french, alone = (
        made(reserved_folder, pairs_file, tmp_path / run, start="base", source_language=language).patch()
        for run, language in (("run", "en"), ("run", "fr"), ("other", "fr"))
    )
    assert english.digest == french.digest == alone.digest
    assert french.meta.evaluation == alone.meta.evaluation
    assert french.meta.evaluation["loss_base"] != english.meta.evaluation["loss_base"]
