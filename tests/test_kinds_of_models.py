"""Models that look tokens up, or use the table, in ways of their own: exact, or refused in a sentence."""

import copy

import pytest
import torch
import transformers
from test_hf import overwritten, some_patch

from ksl_patch import attach
from ksl_patch.errors import BaseMismatchError, RunError

IDS = list(range(2, 390, 3))
PROMPTS = torch.tensor([[5, 8, 300, 17], [17, 44, 5, 251], [299, 5, 8, 14]])
ATTENTION = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip


def build(kind, auto=transformers.AutoModelForCausalLM, **sizes):
    torch.manual_seed(0)
    model = auto.from_config(transformers.AutoConfig.for_model(kind, vocab_size=400, **sizes)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_a_batch_that_is_looked_up_by_columns():
    """XLNet turns a batch around; a square one looks the same."""
    model = build("xlnet", d_model=32, n_layer=2, n_head=4, d_inner=64)
    patch = some_patch(model, 1, IDS)
    with attach(model) as handle:
        handle.load(patch, "a")
        for ids in (PROMPTS, PROMPTS[:, :3]):
            with handle.using(["a", None, "a"]), pytest.raises(RunError, match="not known which row or column"):
                model(ids)
            with handle.using("a"):
                assert torch.equal(model(ids).logits, overwritten(model, patch)(ids).logits)


@pytest.mark.parametrize("kind", ["longformer", "xlm"])
def test_lookups_of_more_or_fewer_columns(kind):
    """Longformer fills its windows up, XLM looks up what is new: the rows are the batch's."""
    if kind == "longformer":
        model = build(kind, transformers.AutoModelForMaskedLM, **ATTENTION, attention_window=8, pad_token_id=1)
        ids = PROMPTS
    else:
        model = build(kind, transformers.AutoModelForCausalLM, emb_dim=32,
                      n_layers=2, n_heads=4, pad_index=1, mask_index=0, causal=True)  # fmt: skip
        ids = PROMPTS
    patch, choices = some_patch(model, 1, IDS), ["a", None, "a"]
    plain = {"a": overwritten(model, patch), None: copy.deepcopy(model)}
    with attach(model) as handle:
        handle.load(patch, "a")
        with handle.using(choices):
            found = model(ids).logits
            if kind == "xlm":
                tokens = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=1)
        for row, choice in enumerate(choices):
            assert torch.equal(found[row], plain[choice](ids).logits[row])
            if kind == "xlm":
                expected = plain[choice].generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=1)
                assert torch.equal(tokens[row], expected[row])


@pytest.mark.parametrize("rows", [2, 3])
def test_a_head_that_sees_more_than_rows_and_columns(rows):
    """ProphetNet predicts two streams: [B, 2, T, d]."""
    model = build("prophetnet", num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
                  num_decoder_attention_heads=4, hidden_size=32, encoder_ffn_dim=64, decoder_ffn_dim=64, ngram=2,
                  pad_token_id=1, is_decoder=True, add_cross_attention=False)  # fmt: skip
    patch = some_patch(model, 1, IDS, side="input+output")
    choices = ["a", None, "a"][:rows]
    plain = {"a": overwritten(model, patch), None: copy.deepcopy(model)}
    with attach(model) as handle:
        handle.load(patch, "a")
        with handle.using(choices):
            found = model(PROMPTS[:rows]).logits
    for row, choice in enumerate(choices):
        torch.testing.assert_close(found[row], plain[choice](PROMPTS[:rows]).logits[row], atol=1e-5, rtol=1e-4)


def test_a_prompt_with_something_before_it():
    """CPMAnt puts ids of its own before those that it is given."""
    model = build("cpmant", hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=64, num_hidden_layers=2)
    patch = some_patch(model, 1, IDS)
    with attach(model) as handle:
        handle.load(patch.with_meta(scope="prompt"), "p")
        handle.load(patch, "a")
        with handle.using("p"), pytest.raises(RunError, match="not known which row or column"):
            model.generate(PROMPTS, max_new_tokens=3, do_sample=False)
        with handle.using("a"):
            assert torch.equal(model(PROMPTS).logits, overwritten(model, patch)(PROMPTS).logits)


def test_a_generation_by_a_model_inside():
    """BLIP-2 hands its prompt to the `generate` of the language model in it."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    text = {"model_type": "opt", "vocab_size": 400, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "word_embed_proj_dim": 32, "pad_token_id": 1, "eos_token_id": 1,
            "max_position_embeddings": 64}  # fmt: skip
    former = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
              "encoder_hidden_size": 32, "vocab_size": 400}  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=former, text_config=text, num_query_tokens=2, image_token_index=399
    )
    torch.manual_seed(0)
    model = transformers.Blip2ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    patch = some_patch(model, 1, IDS)
    ids = torch.tensor([[399, 399, 5, 8, 300]])
    given = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8), "max_new_tokens": 3, "do_sample": False}
    expected = overwritten(model, patch).generate(**given)
    with attach(model) as handle:
        handle.load(patch.with_meta(scope="prompt"), "p")
        handle.load(patch, "a")
        with handle.using("p"), pytest.raises(RunError, match="needs to know where the prompt ends"):
            model.generate(**given)
        with handle.using("a"):
            assert torch.equal(model.generate(**given), expected)


@pytest.mark.parametrize("kind", ["bart", "switch_transformers"])
def test_a_merge_that_would_part_a_shared_table(kind):
    """Switch scales by whether the tables are tied, Bart's are not saved once they are not."""
    sizes = SEQ2SEQ if kind == "bart" else {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4,
                                            "num_decoder_layers": 2, "num_experts": 2, "pad_token_id": 1}  # fmt: skip
    model = build(kind, transformers.AutoModelForSeq2SeqLM, **sizes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with attach(model) as handle:
        handle.load(some_patch(model, 1, IDS), "a")
        with pytest.raises(RunError, match="which this encoder-decoder shares"):
            handle.merge("a")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_encoder_decoder_of_two_tables_generates():
    """The decoder has a table of its own, which a patch of the encoder's leaves alone."""
    side = transformers.BertConfig(vocab_size=400, **ATTENTION)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(side, copy.deepcopy(side))
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 1, 1
    torch.manual_seed(0)
    model = transformers.EncoderDecoderModel(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    patch, settings = some_patch(model, 1, IDS), {"max_new_tokens": 5, "do_sample": False}
    expected = overwritten(model, patch).generate(PROMPTS, **settings)
    with attach(model) as handle, handle.using(handle.load(patch)):
        assert torch.equal(model.generate(PROMPTS, **settings), expected)


def test_features_in_the_place_of_a_prompt():
    """Whisper hears; its decoder's tokens are patched."""
    model = build("whisper", transformers.AutoModelForSpeechSeq2Seq, **SEQ2SEQ, num_mel_bins=8, max_source_positions=8,
                  bos_token_id=2, suppress_tokens=None, begin_suppress_tokens=None)  # fmt: skip
    patch, features = some_patch(model, 1, IDS), torch.randn(2, 8, 16)
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = overwritten(model, patch).generate(input_features=features, **settings)
    with attach(model) as handle, handle.using(handle.load(patch)):
        assert torch.equal(model.generate(input_features=features, **settings), expected)


def test_models_that_cannot_be_patched_say_so():
    deberta = build("deberta-v2", transformers.AutoModelForMaskedLM, **ATTENTION, legacy=False)
    ibert = build("ibert", transformers.AutoModelForMaskedLM, **ATTENTION)
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=ATTENTION | {"vocab_size": 400}, vision_config=ATTENTION | {"image_size": 8, "patch_size": 4}
        )
    )
    for model, message in [
        (deberta, "takes the table as its head"),
        (ibert, "does more than look a row up"),
        (clip, "does not say where its input embedding is|has no input embedding"),
    ]:
        with pytest.raises(BaseMismatchError, match=message):
            attach(model)
        assert "ksl_patch" not in vars(model)
