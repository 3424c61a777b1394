"""Finding a model's embedding, naming a base, and telling one base from another."""

import pytest
import torch
import transformers
from conftest import tiny_llama
from test_patch import make_patch
from torch import nn

from ksl_patch import BaseIdentity, check_base, find_embedding, fingerprint, identify
from ksl_patch.errors import BaseMismatchError

SMALL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def small(kind, **changes):
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4)
    elif kind == "opt":  # word embeddings of another width than the hidden states
        config = transformers.OPTConfig(vocab_size=400, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64,
                                        num_hidden_layers=2, num_attention_heads=4)  # fmt: skip
    else:
        config = transformers.CONFIG_MAPPING[kind](**SMALL, **changes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "tied", "scale"),
    [
        ("llama", False, None),
        ("gpt2", True, None),
        ("opt", True, None),
        ("mistral", False, None),
        ("qwen3", False, None),
        ("gemma", True, 32**0.5),
        ("gemma3_text", True, 32**0.5),
    ],
)
def test_finds_table_head_and_scale(kind, tied, scale):
    model = small(kind)
    table = find_embedding(model)
    [lookup] = table.lookups
    assert lookup.module is model.get_input_embeddings()
    assert table.head is model.get_output_embeddings()
    assert table.tied == tied
    assert (lookup.scale is None) if scale is None else (float(lookup.scale) == pytest.approx(scale, rel=1e-3))
    identity = identify(model)
    assert (identity.vocab_size, identity.hidden_size) == tuple(table.weight.shape)
    assert identity.tied == tied


def test_an_embedding_that_does_more_is_refused(model):
    class Doubled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 2

    model.set_input_embeddings(Doubled(400, 32))
    with pytest.raises(BaseMismatchError, match="Doubled.*does more than look a row up"):
        find_embedding(model)
    model.set_input_embeddings(nn.Sequential())
    with pytest.raises(BaseMismatchError, match="Sequential.*is not a table of rows"):
        find_embedding(model)


def test_fingerprint_depends_on_values_shape_and_dtype():
    table = torch.randn(1000, 8)
    assert fingerprint(table) == fingerprint(table.clone())
    assert len({fingerprint(t) for t in (table, table + 1, table[:-1], table.half(), table.bfloat16())}) == 5


def test_another_base_is_told_apart_with_numbers():
    patch = make_patch()
    with pytest.raises(BaseMismatchError, match="3 of the patch's 3 base rows differ.*first is token 3, the largest"):
        patch.check(tiny_llama(seed=1))
    with pytest.raises(BaseMismatchError, match=r"for a table of shape \[400, 32\].*is \[400, 64\]"):
        patch.check(tiny_llama(hidden_size=64))
    with pytest.raises(BaseMismatchError, match=r"\[401, 32\]"):
        patch.check(tiny_llama(vocab_size=401))
    changed = tiny_llama()
    changed.get_input_embeddings().weight.data[350, 5] += 1e-6
    with pytest.raises(BaseMismatchError, match="1 of the patch's 3 .* token 350, the largest difference 9.*e-07"):
        patch.check(changed)
    changed = tiny_llama()
    changed.get_input_embeddings().weight.data[9] += 1
    patch.check(changed)  # not one of the patch's rows, and the exact check is about these


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_accepted_and_a_different_one_is_not(dtype):
    make_patch().check(tiny_llama(dtype=dtype))
    make_patch(tiny_llama(dtype=dtype)).check(tiny_llama())
    changed = tiny_llama(dtype=dtype)
    changed.get_input_embeddings().weight.data[3] *= 1.05
    with pytest.raises(BaseMismatchError, match="up to rounding"):
        make_patch().check(changed)


@pytest.mark.parametrize("plain", [True, False])
def test_a_table_of_nothing_but_nan_is_another_base(plain):
    class Broken:
        vocab_size, hidden_size = 8, 4

        def __init__(self):
            self.plain = plain

        def rows(self, token_ids):
            return torch.full((len(token_ids), 4), torch.nan)

    identity = BaseIdentity(
        model_id=None, revision=None, fingerprint="0" * 64, vocab_size=8, hidden_size=4, dtype="bfloat16", tied=True,
        tokenizer_digest=None,
    )  # fmt: skip
    with pytest.raises(BaseMismatchError, match="2 of the patch's 2 base rows differ"):
        check_base(identity, torch.tensor([1, 2]), torch.randn(2, 4).bfloat16(), Broken())
