"""A mixed batch gives every prompt the tokens of a model whose table was overwritten by hand."""

import copy

import pytest
import torch
from conftest import tiny_llama
from test_base import small

from ksl_patch import Patch
from ksl_patch.errors import RunError
from ksl_patch.hf import attach, end_token_ids, generate, load_base

PROMPTS = [[5, 9, 300, 17, 40], [9, 300], [17, 17, 5, 250, 9, 31, 40], [300, 5, 9]]
IDS = [5, 9, 17, 300, 333]


def some_patch(model, seed, ids=IDS, **changes):
    g = torch.Generator().manual_seed(seed)
    table = model.get_input_embeddings().weight
    rows = table.detach()[ids] + table.detach().std() * torch.randn(len(ids), table.shape[1], generator=g)
    return Patch.from_model(model, ids, rows, name=f"p{seed}", **changes)


def overwritten(model, patch):
    if patch is None:
        return model
    model = copy.deepcopy(model)
    if patch.meta.side == "input":
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    table = model.get_input_embeddings().weight
    table.data[patch.token_ids] = patch.rows.to(table.dtype)
    return model


@pytest.mark.parametrize("kind", ["llama tied", "llama", "gpt2", "mistral", "qwen3", "gemma", "gemma3_text", "opt"])
def test_logits_of_a_mixed_batch_equal_those_of_overwritten_tables_bit_for_bit(kind):
    model = tiny_llama() if kind == "llama tied" else small(kind)
    patches = {"a": some_patch(model, 1), "b": some_patch(model, 2)}
    choices = [None, "a", "b", "a"]
    ids = torch.tensor([[5, 9, 300, 17], [9, 300, 40, 5], [17, 31, 5, 9], [5, 9, 300, 17]])
    with torch.no_grad(), attach(model) as handle:
        for name, patch in patches.items():
            handle.load(patch, name)
        with handle.using(choices):
            mixed = model(ids).logits
        base = model(ids).logits
    for row, choice in enumerate(choices):
        # The same batch, so that the arithmetic is the same; only the row of interest counts.
        with torch.no_grad():
            assert torch.equal(mixed[row], overwritten(model, patches.get(choice))(ids).logits[row])
        assert torch.equal(mixed[row], base[row]) == (choice is None), "a patch must change the output"


@pytest.mark.parametrize("side", ["input", "input+output"])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_tokens_of_a_mixed_batch_equal_those_of_overwritten_tables(model, tokenizer, side, batch_size):
    patches = [None, some_patch(model, 1, side=side), some_patch(model, 2, side=side), None]
    prompts = [PROMPTS[0]] * 3 + [PROMPTS[2]]
    mixed = generate(model, tokenizer, prompts, patches, max_new_tokens=24, batch_size=batch_size)
    for prompt, patch, completion in zip(prompts, patches, mixed, strict=True):
        [alone] = generate(overwritten(model, patch), tokenizer, [prompt], [None], max_new_tokens=24)
        assert completion == alone
    assert len({completion.text for completion in mixed[:3]}) == 3


def test_separate_output_rows_reach_the_head_alone(model):
    both = some_patch(model, 1, side="input+output", output_rows=torch.zeros(len(IDS), 32))
    ids = torch.tensor([PROMPTS[0]])
    reference = copy.deepcopy(model)
    reference.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    reference.get_input_embeddings().weight.data[both.token_ids] = both.rows
    reference.lm_head.weight.data[both.token_ids] = 0
    with torch.no_grad(), attach(model) as handle, handle.using(handle.load(both)):
        assert torch.allclose(model(ids).logits, reference(ids).logits, atol=1e-6)
        assert model(ids).logits[..., IDS].abs().max() == 0


def test_a_patch_of_scope_prompt_acts_on_the_prompt_only(model, tokenizer):
    everywhere, prompt_only = (some_patch(model, 1, list(range(2, 372)), scope=s) for s in ("all", "prompt"))
    prompts = [PROMPTS[2]] * 2
    first, second = generate(model, tokenizer, prompts, [everywhere, prompt_only], max_new_tokens=24)
    changed = overwritten(model, everywhere)
    with torch.no_grad():
        cache = changed(torch.tensor([PROMPTS[2]]), use_cache=True)
        tokens = [int(cache.logits[0, -1].argmax())]
        past = cache.past_key_values
        while len(tokens) < 24 and tokens[-1] != 1:
            step = model(torch.tensor([[tokens[-1]]]), past_key_values=past, use_cache=True)
            tokens.append(int(step.logits[0, -1].argmax()))
    assert second.text == tokenizer.decode([t for t in tokens if t != 1], skip_special_tokens=True)
    assert first.text != second.text


def test_stopping_is_reported(model, tokenizer):
    model.lm_head.weight.data[:] = 0
    model.get_input_embeddings().weight.data[1] = 0
    [endless] = generate(model, tokenizer, [[5]], [None], max_new_tokens=7)
    assert (endless.stopped, endless.tokens) == (False, 7)
    model.generation_config.eos_token_id = 0  # what a table of zeros always gives
    [stopped] = generate(model, tokenizer, [[5]], [None], max_new_tokens=7)
    assert (stopped.stopped, stopped.tokens, stopped.text) == (True, 1, "")
    assert end_token_ids(model, tokenizer) == [0, 1]


def test_a_base_that_cannot_be_loaded_gives_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for base in (str(tmp_path), str(tmp_path / "none"), "nobody/nothing"):
        with pytest.raises(RunError, match="cannot load the base") as error:
            load_base(base)
        assert "\n" not in str(error.value)
