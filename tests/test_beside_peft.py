"""PEFT's adapters and patches on one model: what PEFT adds to the rows is kept, what goes past them is refused."""

import copy

import pytest
import torch
from conftest import tiny_llama
from peft import IA3Config, LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from test_attach import GREEDY, IDS, PROMPTS, references
from test_hf import some_patch

from ksl_patch import Patch, attach, find_embedding
from ksl_patch.errors import BaseMismatchError, KslPatchError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TARGETS = {"embedding": ["embed_tokens"], "head": ["lm_head"], "both": ["embed_tokens", "lm_head", "q_proj"]}


def with_lora(model, targets, **changes):
    torch.manual_seed(1)
    config = LoraConfig(target_modules=targets, init_lora_weights=False, **changes)
    return get_peft_model(model, config).eval()


def on_its_own_head(model):
    """A copy with a head of its own, so that a merge or an adapter of the one leaves the other alone."""
    model = copy.deepcopy(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@torch.no_grad()
@pytest.mark.parametrize("side", ["input", "input+output"])
@pytest.mark.parametrize("order", ["adapter first", "patches first", "weights come later"])
@pytest.mark.parametrize("where", TARGETS)
def test_a_lora_on_the_patched_modules_adds_to_the_patch_s_rows(where, order, side):
    base = tiny_llama()
    patch = some_patch(base, 1, IDS, side=side)
    plain = {name: with_lora(m, TARGETS[where]) for name, m in references(base, {"a": patch}).items()}
    model = base
    if order == "adapter first":
        model = with_lora(base, TARGETS[where])
    elif order == "weights come later":
        model = get_peft_model(base, LoraConfig(target_modules=TARGETS[where])).eval()
    with attach(model) as handle:
        handle.load(patch, "a")
        if order == "patches first":
            model = with_lora(base, TARGETS[where])
        elif order == "weights come later":
            model.load_state_dict({k: v for k, v in plain[None].state_dict().items() if "lora_" in k}, strict=False)
        with handle.using(["a", None]):
            logits = model(PROMPTS).logits
            tokens = model.generate(input_ids=PROMPTS, **GREEDY).tolist()
        for row, name in enumerate(["a", None]):
            expected = plain[name](PROMPTS).logits[row]
            assert torch.equal(logits[row], expected) or (
                side == "input+output" and torch.allclose(logits[row], expected, atol=1e-5)
            )
            assert tokens[row] == plain[name].generate(input_ids=PROMPTS, **GREEDY).tolist()[row]
        with model.disable_adapter(), handle.using("a"):
            found = model(PROMPTS).logits
    alone = references(tiny_llama(), {"a": patch})["a"](PROMPTS).logits
    assert torch.allclose(found, alone, atol=1e-5)


PAST_THE_ROWS = {
    "trained tokens": TrainableTokensConfig(token_indices=[5, 9], target_modules=["embed_tokens"]),
    "trained tokens in a lora": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 9]),
    "a copy of the embedding": LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "dora": LoraConfig(target_modules=["embed_tokens"], use_dora=True),
}


@pytest.mark.parametrize("kind", PAST_THE_ROWS)
def test_what_goes_past_the_rows_is_refused_before_and_after(kind):
    patch = some_patch(tiny_llama(), 1, IDS)
    before = get_peft_model(tiny_llama(), copy.deepcopy(PAST_THE_ROWS[kind])).eval()
    with pytest.raises(BaseMismatchError, match="does not go through its rows"):
        attach(before)
    assert not {"ksl_patch", "generate"} & vars(before.get_base_model()).keys()
    base = tiny_llama()
    with torch.no_grad(), attach(base) as handle:
        handle.load(patch, "a")
        model = get_peft_model(base, copy.deepcopy(PAST_THE_ROWS[kind])).eval()
        with pytest.raises(KslPatchError, match="does not go through its rows|was replaced"), handle.using("a"):
            model(PROMPTS)
        assert torch.equal(model.unload()(PROMPTS).logits, tiny_llama()(PROMPTS).logits)
        if kind == "a copy of the embedding":
            return  # which PEFT leaves in the embedding's place
        with handle.using("a"):
            assert torch.equal(base(PROMPTS).logits, references(tiny_llama(), {"a": patch})["a"](PROMPTS).logits)


@torch.no_grad()
def test_an_adapter_that_comes_while_a_block_is_open_is_refused_in_it():
    base = tiny_llama()
    with attach(base) as handle:
        handle.load(some_patch(base, 1, IDS), "a")
        with handle.using("a"):
            base(PROMPTS)
            model = get_peft_model(base, copy.deepcopy(PAST_THE_ROWS["trained tokens"])).eval()
            with pytest.raises(BaseMismatchError, match="does not go through its rows"):
                model(PROMPTS)


@torch.no_grad()
def test_a_head_of_its_own_in_an_adapter():
    """modules_to_save=["lm_head"]: input rows act as ever, rows for the head are refused."""
    base = tiny_llama(tied=False)
    patch = some_patch(base, 1, IDS)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])).eval()
    model.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
    plain = copy.deepcopy(model)
    plain.get_base_model().get_input_embeddings().weight.data[patch.token_ids] = patch.rows
    tied = tiny_llama()
    both = some_patch(tied, 1, IDS, side="input+output")
    with attach(model) as handle:
        with handle.using(handle.load(patch, "a")):
            assert torch.equal(model(PROMPTS).logits, plain(PROMPTS).logits)
        with pytest.raises(KslPatchError):
            handle.load(both, "both")


@torch.no_grad()
@pytest.mark.parametrize("where", ["embedding", "head"])
def test_a_merged_lora_is_refused(where):
    base = tiny_llama(tied=False)
    patch = some_patch(base, 1, IDS)
    model = with_lora(base, TARGETS[where])
    with attach(model) as handle:
        handle.load(patch, "a")
        model.merge_adapter()
        with pytest.raises(BaseMismatchError, match="unmerge it first"), handle.using("a"):
            pass
        model.unmerge_adapter()
        with handle.using("a"):
            model(PROMPTS)


@torch.no_grad()
def test_a_row_of_another_kind_of_adapter_beside(tmp_path):
    """IA3 on the layers, and an adapter that is loaded from files while patches are attached."""
    base = tiny_llama()
    patch = some_patch(base, 1, IDS)
    torch.manual_seed(2)
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    saved = get_peft_model(tiny_llama(), config)
    for name, parameter in saved.named_parameters():
        if "ia3" in name:
            parameter.normal_(1, 0.3)
    saved.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(references(base, {"a": patch})["a"], tmp_path).eval()
    with attach(base) as handle:
        handle.load(patch, "a")
        model = PeftModel.from_pretrained(base, tmp_path).eval()
        with handle.using("a"):
            assert torch.equal(model(PROMPTS).logits, plain(PROMPTS).logits)
    # A patch can be made of a model with such adapters: its rows are the base's.
    assert torch.equal(Patch.from_model(model, IDS, patch.rows, name="x").base_rows, patch.base_rows)
    assert find_embedding(model).weight is base.get_input_embeddings().weight
