"""The whole build on a tiny model, in process and through the command line, killed and continued."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from ksl_patch import Patch, ks_test
from ksl_patch.errors import KslPatchError, RunError
from ksl_patch.hf import load_base
from ksl_patch.train.build import Build, build
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.loss import token_loss
from ksl_patch.train.progress import SilentReporter

# d is 32: only large changes are significant, so the learning rates are large.
FAST = {"embed_steps": 20, "embed_lr": 2.0, "steps": 20, "lr": 0.3, "checkpoint_every": 4, "dev": 16, "held_out": 16}


@pytest.fixture
def config(base_folder, pairs_file):
    return BuildConfig(base=str(base_folder), pairs=str(pairs_file), language="es", name="es", **FAST)


class Recorder(SilentReporter):
    def __init__(self):
        self.notes, self.begun = [], []

    def note(self, event, message, **values):
        self.notes.append((event, message, values))

    doubt = note

    def begin(self, stage, total, later=None):
        self.begun.append(stage)


@pytest.mark.slow
def test_a_build_gives_a_patch_of_the_rows_that_the_test_selected(config, tmp_path):
    reporter = Recorder()
    made = Build(config, tmp_path, reporter)
    patch = made.patch()
    assert reporter.begun == ["embedding tuning", "partial tuning"]
    model, tokenizer = load_base(config.base)
    patch.check(model, tokenizer)

    # The ticket is what the test says of the tuned table.
    ids, tuned = made.embedding()
    before = model.get_input_embeddings().weight.detach().clone()
    after = before.clone()
    after[ids] = tuned
    result = ks_test(before, after)
    assert patch.token_ids.tolist() == np.flatnonzero(result.pvalue < 0.05).tolist()
    assert patch.meta.ticket.statistic == result.statistic[patch.token_ids].tolist()
    assert patch.meta.tokens == [tokenizer.decode([i]) for i in patch.token_ids.tolist()]

    # Held-out loss falls, and is that of a model whose table was overwritten by hand.
    evaluation = patch.meta.evaluation
    assert evaluation["pairs"] == 16
    assert evaluation["loss_patch"] < evaluation["loss_base"] - 0.1
    head = model.lm_head.weight.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(head)
    model.get_input_embeddings().weight.data[patch.token_ids] = patch.rows
    made.model = model
    assert token_loss(model, made.dev.examples) == pytest.approx(evaluation["loss_patch"], rel=1e-5)
    assert patch.meta.training.lr == pytest.approx(0.3 * float(before.std()))


@pytest.mark.slow
def test_another_alpha_or_mode_uses_the_same_embedding_tuning(config, tmp_path):
    build(config, tmp_path)
    reporter = Recorder()
    patch = build(dataclasses.replace(config, alpha=None, top_k=5), tmp_path, reporter)
    assert len(patch.token_ids) == 5
    assert reporter.begun == ["partial tuning"]
    reporter = Recorder()
    made = Build(dataclasses.replace(config, alpha=None, top_k=5, mode="transfer"), tmp_path, reporter)
    transferred = made.patch()
    assert reporter.begun == []
    ids, tuned = made.embedding()
    assert torch.equal(transferred.rows, tuned[torch.searchsorted(ids, transferred.token_ids)])
    assert transferred.token_ids.tolist() == patch.token_ids.tolist()
    assert transferred.meta.training.steps == 0


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["frequency", "random", "l2"])
def test_controls_build_too(config, tmp_path, selection):
    reporter = Recorder()
    chosen = dataclasses.replace(config, selection=selection, alpha=None, top_k=6)
    patch = build(chosen, tmp_path, reporter)
    assert len(patch.token_ids) == 6
    assert patch.meta.ticket.selection == selection
    assert patch.meta.ticket.statistic is None
    # Only the L2 control looks at a tuned table.
    assert ("embedding tuning" in reporter.begun) == (selection == "l2") == (patch.meta.training.embed_steps > 0)


def test_the_output_side_trains_the_tied_head_too(config, tmp_path):
    both = dataclasses.replace(config, side="input+output", alpha=None, top_k=8)
    patch = build(both, tmp_path)
    assert patch.meta.side == "input+output"
    assert patch.meta.evaluation["loss_patch"] < patch.meta.evaluation["loss_base"] - 0.1


@pytest.mark.slow
def test_what_cannot_be_built_is_refused(config, tmp_path, pairs_file):
    for changes, message in [
        ({"embed_lr": 1e-4}, "the ticket is empty: no row has p < 0.05"),
        ({"held_out": 10_000}, "give more pairs"),
        ({"max_length": 8}, "longer than 8 tokens"),
        ({"language": "not a tag"}, "BCP 47"),
        ({"name": "a/b"}, "is not a patch name"),
        ({"base": str(tmp_path / "none")}, "cannot load the base: there is no folder"),
        ({"base": "nobody/nothing"}, "cannot load the base nobody/nothing"),
        ({"selection": "random"}, "needs top_k"),
    ]:
        with pytest.raises(KslPatchError, match=message) as error:
            build(dataclasses.replace(config, **changes), tmp_path / "run")
        assert "\n" not in str(error.value)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RunError, match="cannot keep the run"):
        build(config, blocked)


def command(base_folder, pairs_file, output):
    return [
        sys.executable, "-m", "ksl_patch", "build", "--base", base_folder, "--pairs", pairs_file, "--language", "es",
        "-o", output, "--json", "--top-k", "4", "--checkpoint-every", "3", "--held-out", "8",
        "--embed-steps", "8", "--embed-lr", "2", "--steps", "8", "--lr", "0.3", "--resume", str(output) + ".work",
    ]  # fmt: skip


def start(arguments):
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1750000000", "OMP_NUM_THREADS": "2"}
    return subprocess.Popen(
        [str(a) for a in arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def events_until(process, stop):
    events = []
    for line in process.stdout:
        events.append(json.loads(line))
        if stop(events[-1]):
            break
    return events


@pytest.mark.slow
def test_a_build_killed_in_each_stage_continues_to_the_same_bytes(base_folder, pairs_file, tmp_path):
    whole = start(command(base_folder, pairs_file, tmp_path / "whole.safetensors"))
    broken = command(base_folder, pairs_file, tmp_path / "broken.safetensors")

    def kill_when(stop):
        process = start(broken)
        events = events_until(process, stop)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        return events

    def at(stage, step):
        return lambda e: e["event"] == "step" and e["stage"] == stage and e["step"] == step

    kill_when(at("embedding tuning", 5))
    # Continues from step 3, and is killed when the tuning is over, before or in the test.
    events = kill_when(lambda e: e["event"] == "end")
    assert {"event": "resumed", "message": "embedding tuning: continues at step 3", "step": 3} in events
    assert not (tmp_path / "broken.safetensors").exists()
    events = kill_when(at("partial tuning", 7))
    last = start(broken)
    output, errors = last.communicate()
    assert last.returncode == 0, errors
    events = [json.loads(line) for line in output.splitlines()]
    assert [e["stage"] for e in events if e["event"] == "begin"] == ["partial tuning"]
    assert any(e["event"] == "resumed" and e["message"] == "partial tuning: continues at step 6" for e in events)
    assert whole.wait() == 0, whole.stderr.read()

    first, second = (Patch.load(tmp_path / name) for name in ("whole.safetensors", "broken.safetensors"))
    assert events[-1]["digest"] == second.digest == first.digest
    assert dataclasses.replace(second.meta, name="whole") == first.meta
    assert torch.equal(first.rows, second.rows)
