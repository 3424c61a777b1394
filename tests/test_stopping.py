"""`--steps auto`: the rows' average, when it is enough, and that a killed one goes on to the same rows."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_cli

from ksl_patch.errors import RunError
from ksl_patch.patch import Patch
from ksl_patch.ticket import Ticket
from ksl_patch.train.build import Build
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.loss import token_loss
from ksl_patch.train.progress import SilentReporter
from ksl_patch.train.reopen import reopen
from ksl_patch.train.stopping import BestAverage
from ksl_patch.train.ticket_checks import report_unread


class Failing(SilentReporter):
    """Keeps the notes, and fails at one of them."""

    def __init__(self, event=None, step=None):
        self.at, self.notes = (event, step), []

    def note(self, event, message, **values):
        if (event, values.get("step")) == self.at:
            raise OSError("failed")
        self.notes.append((event, values))


@pytest.fixture
def build(tmp_path, base_folder, pairs_file):
    settings = {
        "base": str(base_folder), "pairs": str(pairs_file), "language": "es", "name": "es", "alpha": None, "top_k": 4,
        "selection": "frequency", "steps": 120, "auto_steps": True, "validation": 6, "batch_size": 2, "lr": 0.5,
        "dev": 3, "held_out": 4, "checkpoint_every": 25,
    }  # fmt: skip

    def made(reporter=None, run="run", **changes):
        return Build(BuildConfig(**settings | changes), tmp_path / run, reporter or SilentReporter())

    return made


def walked(losses, most=1000):
    """A tuning whose rows are [[step]], and its control, stopped at the end or by the losses that its looks find."""
    rows, found = torch.nn.Parameter(torch.zeros(1, 1)), iter(losses)
    averaging = BestAverage(rows, lambda: next(found), SilentReporter(), "tuning")
    control, state = SimpleNamespace(should_training_stop=False), SimpleNamespace(max_steps=most)
    state.is_world_process_zero = True
    for state.global_step in range(1, most + 1):
        rows.data.fill_(state.global_step)
        averaging.on_step_end(None, state, control)
        assert rows.item() == state.global_step  # a look leaves no trace
        if control.should_training_stop:
            break
    return averaging, state.global_step


def test_the_average_forgets_the_first_steps_as_it_goes():
    """Of the rows 1, 2, ..., t with weights that grow with the eighth power it is (9 t + 1) / 10."""
    averaging, _ = walked([1.0], most=20)
    assert averaging.average.item() == pytest.approx((9 * 20 + 1) / 10)
    assert walked([1.0, 2.0, 3.0], most=59)[0].best.item() == pytest.approx((9 * 20 + 1) / 10)


@pytest.mark.parametrize(
    ("losses", "last", "best"),
    [
        ([3.0] * 9, 60, 20),  # never fell after the first look
        ([5.0, 4.0, 3.0, 2.0, 1.0] + [1.0] * 9, 160, 100),  # a third of the steps without a fall
        ([5.0, 4.0, 3.999, 3.998, 3.997, 3.996], 80, 80),  # lower by too little: kept, and not waited for
        ([9.0 - i for i in range(8)], 150, 150),  # as many steps as there are
    ],
)  # fmt: skip
def test_it_is_enough_when_the_loss_has_not_fallen_in_a_third_of_the_steps(losses, last, best):
    averaging, stopped = walked(losses, most=150 if last == 150 else 1000)
    assert stopped == last
    assert averaging.result()["losses"].tolist()[-1][0] == last
    assert averaging.best.item() == pytest.approx((9 * best + 1) / 10)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {}, {"scope": "prompt"}, {"side": "input+output"}, {"accumulate": 3, "batch_size": 1},
])  # fmt: skip
def test_a_build_keeps_the_rows_of_the_lowest_validation_loss(build, changes):
    reporter = Failing()
    made = build(reporter, **changes)
    patch = made.patch()
    looks = [values for event, values in reporter.notes if event == "validation"]
    lowest = min(looks, key=lambda each: each["loss"])
    assert len(looks) >= 2
    assert lowest["loss"] == pytest.approx(made.patched_loss(patch, made.validation), rel=1e-5)
    assert lowest["loss"] < token_loss(made.model, made.validation.examples) - 0.1
    assert patch.meta.training.steps == lowest["step"]
    assert patch.meta.training.pairs_read == len(made.pairs_read_in(lowest["step"]))
    assert "validation" in patch.meta.training.optimiser
    assert patch.meta.training.hyperparameters["lr_scheduler_type"] == "constant"
    assert patch.meta.training.hyperparameters["validation_pairs"] == 6
    assert not made.model.training
    # They are pairs of their own, and what is held out is what it was.
    parts = made.pairs.train, made.pairs.dev, made.pairs.held_out, made.pairs.validation
    keys = [{pair.key for pair in part} for part in parts]
    assert len(set().union(*keys)) == sum(map(len, keys))
    given = build(run="other", auto_steps=False, **changes)
    assert (given.pairs.dev, given.pairs.held_out) == (made.pairs.dev, made.pairs.held_out)
    assert given.pairs.validation == []
    again = reopen(patch, made.run)
    assert again.patch_of(again.ticket()).digest == patch.digest


@pytest.mark.slow
@pytest.mark.parametrize(("event", "step"), [("validation", 40), ("best", None)])
def test_one_that_is_cut_off_goes_on_to_the_same_rows(build, event, step):
    whole, every = Failing(), {"checkpoint_every": 20, "lr": 1e-6}
    patch = build(whole, **every).patch()
    [best] = [values for name, values in whole.notes if name == "best"]
    assert best["steps"] == 60
    with pytest.raises(OSError, match="failed"):
        build(Failing(event, best["step"] if step is None else step), "cut", **every).patch()
    resumed = Failing()
    assert build(resumed, "cut", **every).patch().digest == patch.digest
    # What had ended trains no further.
    assert ("resumed" in dict(resumed.notes)) == (event == "validation")


def test_what_does_not_go_together_is_said(build, base_folder, pairs_file, tmp_path):
    for changes in ({"mode": "transfer"}, {"validation": 0}):
        with pytest.raises(RunError, match="validation pairs: give some, and mode 'partial'"):
            build(**changes)
    command = ["build", "--base", base_folder, "--pairs", pairs_file, "--language", "es", "-o", tmp_path / "es", "-y"]
    for options, why in [
        (["--validation", 8], "--validation is for --steps auto"),
        (["--steps", "auto", "--schedule", "cosine", "--rows", 3], "--schedule plans the steps"),
        (["--steps", "auto", "--epochs", 2], "--steps and --epochs say the same"),
        (["--steps", "automatic"], "'automatic' is neither a number of steps, 1 or more, nor 'auto'"),
        (["--steps", "auto", "--mode", "transfer"], "--steps auto ends the rows' own tuning"),
        (["--steps", "auto", "--validation", 9999], "9999 to stop by"),
    ]:  # fmt: skip
        code, _, err = run_cli(*command, *options)
        assert code
        assert why in " ".join(err.split())


@pytest.mark.slow
def test_the_command_line_says_what_it_stops_by_and_where(base_folder, pairs_file, tmp_path):
    code, out, err = run_cli(
        "build", "--base", base_folder, "--pairs", pairs_file, "--language", "es", "-o", tmp_path / "es.safetensors",
        "--selection", "frequency", "--top-k", 4, "--steps", "auto", "--validation", 6, "--dev", 3, "--held-out", 4,
        "--lr", 1, "--json", "-y",
    )  # fmt: skip
    assert code == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    [start] = [e for e in events if e["event"] == "start"]
    [best] = [e for e in events if e["event"] == "best"]
    assert start["validation"] == 6
    assert "6 to stop by" in start["message"]
    assert 0 < best["step"] <= best["steps"] < 1000
    code, out, _ = run_cli("inspect", tmp_path / "es.safetensors")
    assert f"{best['step']} steps of the rows at learning rate" in " ".join(out.split())


@pytest.mark.slow
def test_two_processes_share_the_looks_and_stop_together(base_folder, pairs_file, tmp_path):
    output = tmp_path / "two.safetensors"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "ksl_patch", "build", "--base",
        base_folder, "--pairs", pairs_file, "--language", "es", "-o", output, "--selection", "frequency", "--top-k", 4,
        "--steps", "auto", "--validation", 5, "--dev", 3, "--held-out", 4, "--lr", 1e-6, "--json", "-y",
    ]  # fmt: skip
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    events = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    [best] = [e for e in events if e["event"] == "best"]
    assert best["steps"] == 60
    patch = Patch.load(output)
    assert patch.meta.training.processes == 2
    made = reopen(patch, output.with_name(f"{output.name}.run"))
    assert best["loss"] == pytest.approx(made.patched_loss(patch, made.validation), rel=1e-5)


@pytest.mark.slow
def test_controls_and_seeds_stop_by_themselves_too(build):
    made = build(selection="ks", embed_steps=20, embed_lr=2.0, top_k=3)
    patch = made.patch()
    hyperparameters = patch.meta.training.hyperparameters
    assert hyperparameters["lr_scheduler_type"] == "constant"
    assert hyperparameters["embed_lr_scheduler_type"] == "linear"
    assert hyperparameters["steps_trained"] >= patch.meta.training.steps
    again = reopen(patch, made.run)
    for seed, selection in ((0, "random"), (0, "frequency"), (1, "ks")):
        other = again.seeded(seed)
        control = other.patch_of(other.ticket(selection, 3))
        assert control.meta.training.hyperparameters["validation_pairs"] == 6
        assert other.validation.pairs == made.validation.pairs
        # Every row of a control has been read by the first step that may be kept.
        assert (other.counts_in(20)[control.token_ids] > 0).all() or selection == "ks"


@pytest.mark.slow
def test_each_row_that_is_tried_alone_stops_by_itself(build):
    reporter = Failing()
    patch = build(reporter, selection="single", top_k=None, steps=60, template="en {source} es").patch()
    tried = [values for event, values in reporter.notes if event == "candidate"]
    stopped = [values for event, values in reporter.notes if event == "best"]
    assert len(tried) == len(stopped) > 1
    best = min(tried, key=lambda each: each["loss"])
    assert patch.token_ids.tolist() == [best["token_id"]]
    assert patch.meta.training.steps == stopped[tried.index(best)]["step"]


def test_a_row_that_no_kept_step_read_is_said(build):
    reporter = Failing()
    made = build(reporter, batch_size=1)
    read, late = made.counts_in(1), made.counts_in(120)
    known, rare = int(read.argmax()), int(((read == 0) & (late > 0)).argmax())
    ticket = Ticket(np.array(sorted([known, rare])), "given")
    report_unread(made, ticket, 1)
    assert ("unread", {"token_ids": [rare]}) in reporter.notes
    reporter.notes.clear()
    report_unread(made, ticket, 120)
    assert reporter.notes == []


def test_the_same_pairs_are_held_out_of_a_part_of_the_file(build):
    auto, given = (build(max_pairs=40, validation=n, auto_steps=n > 1) for n in (6, 1))
    assert (auto.pairs.held_out, auto.pairs.dev) == (given.pairs.held_out, given.pairs.dev)
    assert (len(auto.train), len(given.train)) == (40, 40)
