"""Tuning trains the rows it is told to and nothing else, and holds no more than it needs."""

import copy

import pytest
import safetensors.torch
import torch
from conftest import PAIRS, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from ksl_patch.bank import SlotRows
from ksl_patch.data.encoding import collate, encode
from ksl_patch.data.pairs import Pair
from ksl_patch.data.templates import make_template
from ksl_patch.errors import RunError
from ksl_patch.hf import attach
from ksl_patch.overlay import training
from ksl_patch.train.progress import SilentReporter
from ksl_patch.train.tune import TuneSettings, tune_rows

IDS = torch.tensor([3, 17, 300])


@pytest.fixture
def examples(tokenizer):
    template = make_template("plain", source_language="en", language="es", tokenizer=tokenizer)
    return encode(template, [Pair(*pair) for pair in PAIRS[:40]], tokenizer, 1, 256).examples


def tune(model, examples, folder, ids=IDS, side="input", reporter=None, **changes):
    settings = TuneSettings(
        **{"steps": 6, "lr": 0.05, "batch_size": 4, "accumulate": 1, "seed": 0, "checkpoint_every": 2} | changes
    )
    reporter = reporter or SilentReporter()
    return tune_rows(model, ids, examples, settings, side=side, folder=folder, stage="test", reporter=reporter)


def overwritten(model, ids, rows, side="input"):
    """The reference: a model whose table was overwritten by hand."""
    model = copy.deepcopy(model)
    if side == "input":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.get_input_embeddings().weight.data[ids] = rows.to(model.dtype)
    return model


@pytest.mark.parametrize("side", ["input", "input+output"])
def test_the_loss_and_its_gradient_are_those_of_an_overwritten_table(model, examples, side):
    rows = torch.randn(3, 32)
    batch = collate(examples[:4], pad=0)
    reference = overwritten(model, IDS, rows, side)
    reference.requires_grad_(False)
    table = reference.get_input_embeddings().weight.requires_grad_(True)
    expected = reference(**batch).loss
    expected.backward()
    with training(model, SlotRows(IDS, rows, output=side == "input+output")) as trained:
        loss = model(**batch).loss
        loss.backward()
        assert torch.allclose(loss, expected, rtol=1e-6)
        assert torch.allclose(trained.rows.grad, table.grad[IDS], rtol=1e-4, atol=1e-7)
        assert trained.rows.grad.abs().sum() > 0


@pytest.mark.parametrize("side", ["input", "input+output"])
def test_only_the_rows_change(model, examples, tmp_path, side):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = tune(model, examples, tmp_path, side=side)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    table = before["model.embed_tokens.weight"]
    assert rows.shape == (3, 32)
    assert rows.dtype == torch.float32
    assert (rows[2] != table[300]).any()
    # Through the overlay every other row is the base's, bit for bit.
    with attach(model) as handle, handle.serving(handle.bank.add(SlotRows(IDS, rows))):
        through = model.get_input_embeddings()(torch.arange(400)[None])[0]
    others = torch.ones(400, dtype=torch.bool)
    others[IDS] = False
    assert torch.equal(through[others], table[others])
    assert torch.equal(through[IDS], rows)


def test_the_optimiser_holds_k_times_d_numbers(model, examples, tmp_path):
    class Look(SilentReporter):
        sizes = ()

        def step(self, done, loss=None):
            if done == 5:
                state = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
                Look.sizes = [tuple(v.shape) for s in state.values() for v in s.values() if v.ndim]
                saved = (tmp_path / "checkpoint-4" / "model.safetensors").stat().st_size
                assert saved < 3 * 32 * 4 + 200

    tune(model, examples, tmp_path, reporter=Look())
    assert Look.sizes == [(3, 32), (3, 32)]


def test_a_step_makes_no_tensor_of_the_tables_size(examples):
    model = tiny_llama(vocab_size=6000)
    table = model.get_input_embeddings().weight
    batch = collate(examples[:1], pad=0)
    batch = {name: value[:, -20:] for name, value in batch.items()}  # logits stay smaller than the table

    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                own = isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != (
                    table.untyped_storage().data_ptr()
                )
                if own:
                    Largest.largest = max(Largest.largest, tensor.numel())
            return out

    model.requires_grad_(False)
    with training(model, SlotRows(IDS, table.detach()[IDS], output=True)) as trained:
        optimiser = torch.optim.AdamW([trained.rows])
        with Largest():
            model(**batch).loss.backward()
            optimiser.step()
    assert 0 < Largest.largest < table.numel()


@pytest.mark.slow
def test_the_same_pairs_give_the_same_rows_and_another_order_gives_others(model, examples, tmp_path):
    first = tune(model, examples, tmp_path / "a")
    assert torch.equal(first, tune(model, examples, tmp_path / "b"))
    assert not torch.equal(first, tune(model, examples[::-1], tmp_path / "c"))
    assert torch.equal(first, tune(model, examples, tmp_path / "d", gradient_checkpointing=True))


def test_a_loss_that_is_no_number_stops_the_stage(model, examples, tmp_path):
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(RunError, match=r"not a number any more at step 1; lower the learning rate"):
        tune(model, examples, tmp_path)
    assert not model.training


def test_a_finished_stage_is_checked_before_it_is_used(model, examples, tmp_path):
    rows = tune(model, examples, tmp_path)
    assert torch.equal(tune(model, examples, tmp_path), rows)
    for damage in (
        {"rows": rows[:2], "token_ids": IDS},
        {"rows": rows, "token_ids": IDS + 1},
        {"rows": rows * torch.nan, "token_ids": IDS},
    ):
        (tmp_path / "rows.safetensors").write_bytes(safetensors.torch.save(damage))
        with pytest.raises(RunError, match="delete its folder"):
            tune(model, examples, tmp_path)
    (tmp_path / "rows.safetensors").write_bytes(b"cut")
    with pytest.raises(RunError, match="delete its folder"):
        tune(model, examples, tmp_path)


def test_two_builds_do_not_train_in_one_folder(model, examples, tmp_path):
    refused = []

    class Second(SilentReporter):
        def step(self, done, loss=None):
            if done == 2:
                with pytest.raises(RunError, match="another build is training"):
                    tune(copy.deepcopy(tiny_llama()), examples, tmp_path)
                refused.append(done)

    tune(model, examples, tmp_path, reporter=Second())
    assert refused
