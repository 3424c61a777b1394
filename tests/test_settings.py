"""Settings of a build beside the usual ones: epochs, schedules, learning rates as papers give them, presets."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import run_cli

from ksl_patch.base import find_embedding
from ksl_patch.data.templates import make_template
from ksl_patch.errors import RunError
from ksl_patch.hf import load_base
from ksl_patch.patch import Patch
from ksl_patch.train.build import Build
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.progress import SilentReporter
from ksl_patch.train.reopen import reopen
from ksl_patch.train.tune import TuneSettings


@pytest.fixture
def build(tmp_path, base_folder, pairs_file):
    settings = {
        "base": str(base_folder), "pairs": str(pairs_file), "language": "es", "name": "es", "alpha": None, "top_k": 4,
        "steps": 3, "embed_steps": 2, "batch_size": 4, "dev": 2, "held_out": 4, "max_pairs": 30,
    }  # fmt: skip
    return lambda **changes: Build(BuildConfig(**settings | changes), tmp_path / "run", SilentReporter())


def test_epochs_are_so_many_steps_and_the_same_patch(build):
    by_epochs = build(epochs=1.5, embed_epochs=0.2, accumulate=2)
    assert (by_epochs.config.steps, by_epochs.config.embed_steps) == (math.ceil(1.5 * 30 / 8), 1)
    patch, by_steps = by_epochs.patch(), build(steps=6, embed_steps=1, accumulate=2)
    assert by_steps.patch().digest == patch.digest
    assert patch.meta.training.steps == 6
    again = reopen(patch, by_epochs.run)
    assert (again.config.steps, again.config.embed_steps) == (6, 1)
    assert again.patch_of(again.ticket()).digest == patch.digest


def test_a_learning_rate_of_the_optimiser_s_is_that(build):
    scale = build().scale
    absolute, relative = build(lr=0.01, embed_lr=0.02, absolute_lr=True), build(lr=0.01 / scale, embed_lr=0.02 / scale)
    patch = absolute.patch()
    assert patch.meta.training.lr == pytest.approx(0.01)
    assert patch.meta.training.embed_lr == pytest.approx(0.02)
    assert torch.allclose(patch.rows, relative.patch().rows, atol=1e-6)
    # Plain Adam's first step is the learning rate in size.
    moved = build(lr=0.01, absolute_lr=True, steps=1, rows=(int(patch.token_ids[0]),), top_k=None)
    rows = moved.patch()
    assert (rows.rows - rows.base_rows).abs().max() == pytest.approx(0.01, rel=1e-3)


def test_schedules_and_warm_up_are_trained_and_written_down(build):
    patches = {
        key: build(schedule=key[0], warmup=key[1], steps=6).patch()
        for key in (("linear", 0.0), ("cosine", 0.0), ("cosine", 0.4))
    }
    assert len({patch.digest for patch in patches.values()}) == 3
    meta = patches["cosine", 0.4].meta.training
    assert "cosine decay" in meta.optimiser
    assert meta.hyperparameters["lr_scheduler_type"] == "cosine"
    assert (meta.hyperparameters["warmup_steps"], meta.hyperparameters["embed_warmup_steps"]) == (3, 1)
    settings = TuneSettings(
        steps=6, lr=1, batch_size=1, accumulate=1, seed=0, checkpoint_every=1, schedule="cosine", warmup=0.4
    )
    assert settings.optimiser(4)["warmup_steps"] == 3


def test_stages_of_the_usual_settings_keep_their_names(build):
    key = build().key_of(3, 0.1, None)
    assert not {"schedule", "warmup"} & key.keys()
    changed = build(schedule="cosine", warmup=0.1).key_of(3, 0.1, None)
    assert (changed["schedule"], changed["warmup"]) == ("cosine", 0.1)


def test_the_alpaca_prompt(tokenizer):
    made = make_template("alpaca", source_language="en", language="ca", tokenizer=tokenizer)
    assert made.text.startswith("Below is an instruction that describes a task")
    assert "### Instruction:\nTranslate this sentence from English to Catalan.\n\n### Input:\n{source}\n\n" in made.text
    assert made.text.endswith("### Response:\n")
    assert made.fields is None


def test_the_paper_s_preset_and_what_counts_above_it(tmp_path, base_folder, pairs_file):
    common = ("build", "--base", base_folder, "--pairs", pairs_file, "--language", "es", "--preset", "paper",
              "--dev", 2, "--held-out", 4, "--max-pairs", 24, "--epochs", 1, "--warmup", 0, "-y")  # fmt: skip
    code, out, err = run_cli(*common, "--top-k", 5, "--json", "-o", tmp_path / "es.safetensors")
    assert code == 0, (out, err)
    training = Patch.load(tmp_path / "es.safetensors").meta.training
    assert (training.steps, training.embed_steps, training.batch_size) == (1, 1, 128)
    assert (training.lr, training.embed_lr) == (pytest.approx(1e-2), pytest.approx(2e-5))
    assert training.hyperparameters["lr_scheduler_type"] == "cosine"
    assert training.hyperparameters["damp_rare"] is False
    assert Patch.load(tmp_path / "es.safetensors").meta.template.text.startswith("Below is an instruction")
    code, _, err = run_cli(*common, "--top-k", 5, "--steps", 3, "-o", tmp_path / "x.safetensors")
    assert (code, "--steps and --epochs say the same" in err) == (2, True)


def test_steps_count_above_a_preset_s_epochs(tmp_path, base_folder, pairs_file):
    file = tmp_path / "patches.toml"
    file.write_text(
        f'base = "{base_folder}"\n[build]\npreset = "paper"\ntop-k = 3\ndev = 2\nheld-out = 4\nmax-pairs = 24\n'
        f'template = "plain"\n[patches.es]\npairs = "{pairs_file}"\nembed-steps = 2\n'
    )
    code, out, err = run_cli("build", "--config", file, "--steps", 4, "--json")
    assert code == 0, (out, err)
    training = Patch.load(tmp_path / "es.safetensors").meta.training
    assert (training.steps, training.embed_steps, training.batch_size) == (4, 2, 128)
    assert json.loads(out.splitlines()[-1])["event"] == "fleet"


def test_resolved_settings_stay_as_they_are():
    config = BuildConfig(base="b", pairs="p", language="es", name="es", epochs=2, lr=0.3, absolute_lr=True)
    once = config.resolved(100, 8, 0.5)
    assert (once.steps, once.lr, once.epochs, once.absolute_lr) == (25, 0.6, None, False)
    assert once.resolved(7, 1, 9.0) == once
    assert replace(config, epochs=0.001).resolved(100, 8, 1.0).steps == 1


def test_the_scale_is_the_table_s(build, base_folder):
    table = find_embedding(load_base(str(base_folder), device="cpu")[0]).weight
    assert build().scale == pytest.approx(float(table.detach().std()))


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_base_in_parts_is_refused(build, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(RunError, match="would cut the base into parts"):
        build()
