"""Small real things: a tiny Llama with a trained tokenizer, sentence pairs in files, and the real Gemma 3 270M."""

import io
import json
import logging
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import huggingface_hub
import pytest
import torch
import transformers
from hub_server import Hub
from huggingface_hub import constants
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ksl_patch import attach
from ksl_patch.base import find_embedding
from ksl_patch.cli import main
from ksl_patch.hf import load_base
from ksl_patch.patch import Patch

transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).parents[1]
DEMO = Path(os.environ.get("KSL_PATCH_DEMO", ROOT / ".demo"))

NAME = "<|reserved_special_token_{}|>"
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}{# <|reserved_special_token_3|> #}"
)
NOUNS = {"cat": "gato", "dog": "perro", "house": "casa", "book": "libro", "sea": "mar", "bread": "pan", "hand": "mano"}
VERBS = {"sees": "ve", "wants": "quiere", "has": "tiene", "finds": "encuentra", "loves": "ama"}
PAIRS = [
    (f"The {a} {verb} the {b}.", f"El {NOUNS[a]} {VERBS[verb]} el {NOUNS[b]}.")
    for a in NOUNS
    for verb in VERBS
    for b in NOUNS
    if a != b
]


def some(folder, name, ids, **changes):
    model, tokenizer = load_base(str(folder), device="cpu")
    rows = find_embedding(model).weight.detach()[ids]
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(len(name)))
    return Patch.from_model(model, ids, rows + noise, name=name, tokenizer=tokenizer, **changes)


def run_cli(*arguments):
    """The command line in this process: exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["ksl-patch", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            logging.disable(logging.NOTSET)
    return code or 0, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session", autouse=True)
def threads():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [text for pair in PAIRS for text in pair] + ["Translate this sentence from English to Spanish.\n"] * 50
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def tiny_llama(tied=True, seed=0, dtype=torch.float32, hidden_size=32, vocab_size=400):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def patches(model):
    from test_attach import IDS
    from test_hf import some_patch

    return {"a": some_patch(model, 1, IDS), "b": some_patch(model, 2, IDS)}


@pytest.fixture
def plain(model, patches):
    """Models of the same name whose table was overwritten by hand; None is the base."""
    from test_attach import references

    return references(model, patches)


@pytest.fixture
def handle(model, patches, plain):
    """The two patches on the model."""
    with attach(model) as handle:
        for name, patch in patches.items():
            handle.load(patch, name)
        yield handle


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, tokenizer):
    """A tiny base on disk, as `--base` takes it."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reserved_tokenizer(tokenizer):
    """The tiny tokenizer with 12 reserved tokens (400 to 411): 1 pads, 3 is in the chat template."""
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<s>", eos_token="</s>",
    )  # fmt: skip
    made.add_tokens([f"fill{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(400 - len(made))])
    made.add_tokens([AddedToken(NAME.format(i), special=True, normalized=False) for i in range(12)])
    made.pad_token = NAME.format(1)
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="session")
def reserved_folder(tmp_path_factory, reserved_tokenizer):
    path = tmp_path_factory.mktemp("reserved") / "base"
    tiny_llama(vocab_size=416).save_pretrained(path)  # four rows that have no text
    reserved_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "es.jsonl"
    path.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in PAIRS))
    return path


@pytest.fixture(scope="session")
def gemma():
    """The folder of the real Gemma 3 270M."""
    folder = DEMO / "gemma3"
    assert (folder / "config.json").is_file(), f"no model in {folder}: run `make model`, or leave out `-m real`"
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    monkeypatch.setenv("KSL_PATCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.close()
