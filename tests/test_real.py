"""The real thing: Gemma 3 270M and GNOME's help. `make model` gets both."""

import dataclasses

import pytest
import torch
from conftest import DEMO
from test_hf import overwritten

from ksl_patch import Patch, attach
from ksl_patch.errors import BaseMismatchError
from ksl_patch.hf import generate, load_base
from ksl_patch.train.build import Build
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.progress import SilentReporter

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def build(gemma, tmp_path_factory):
    config = BuildConfig(
        base=str(gemma),
        pairs=str(DEMO / "gnome" / "en-de.jsonl"),
        group="page",
        language="de",
        name="de",
        alpha=None,
        top_k=18,
        embed_steps=12,
        steps=12,
        dev=24,
        held_out=24,
    )
    return Build(config, tmp_path_factory.mktemp("real"), SilentReporter())


@pytest.fixture(scope="module")
def patch(build):
    return build.patch()


def test_held_out_loss_falls_against_the_base_and_against_random_rows(build, patch):
    losses = patch.meta.evaluation
    control = build.ticket("random", 18)
    random_loss = build.patched_loss(build.patch_from(control, build.rows(control)))
    # Random rows are of tokens that were read: the patch led by 0.23 when this was written. The margin is half of that.
    assert losses["loss_patch"] < losses["loss_base"] - 0.25
    assert losses["loss_patch"] < random_loss - 0.11


def test_the_file_is_small_and_gives_the_tokens_of_an_overwritten_table(build, patch, gemma, tmp_path):
    path = tmp_path / "de.safetensors"
    patch.save(path)
    assert path.stat().st_size < 2 * 18 * 640 * 2 + 16_000
    loaded = Patch.load(path)
    model, tokenizer = load_base(str(gemma), dtype=torch.float32)
    loaded.check(model, tokenizer)
    prompts = [example.prompt for example in build.held_out.examples[:3]]
    choices = [loaded, None, loaded]
    mixed = generate(model, tokenizer, prompts, choices, max_new_tokens=16)
    for prompt, choice, completion in zip(prompts, choices, mixed, strict=True):
        assert generate(overwritten(model, choice), tokenizer, [prompt], [None], max_new_tokens=16) == [completion]
    assert mixed[0] != generate(model, tokenizer, prompts[:1], [None], max_new_tokens=16)[0]
    ids = torch.tensor([prompts[0]] * 3)
    reference = overwritten(model, loaded)
    with torch.no_grad(), attach(model, tokenizer=tokenizer) as handle, handle.using([handle.load(path), None, "de"]):
        logits = model(ids).logits
        assert torch.equal(logits[[0, 2]], reference(ids).logits[[0, 2]])
    with torch.no_grad():
        assert torch.equal(logits[1], model(ids).logits[1])
    assert not torch.equal(logits[0], logits[1])


def test_the_stored_rows_are_bfloat16_like_the_base(patch, gemma):
    model, tokenizer = load_base(str(gemma))
    assert model.dtype == torch.bfloat16
    assert torch.equal(patch.base_rows, model.get_input_embeddings().weight[patch.token_ids])
    patch.check(model, tokenizer)
    other = dataclasses.replace(patch, base_rows=patch.base_rows + 1)
    with pytest.raises(BaseMismatchError, match="base rows differ"):
        other.check(model, tokenizer)
