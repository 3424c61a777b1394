"""The command line as a user meets it."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from conftest import run_cli, tiny_llama

from ksl_patch import Patch
from ksl_patch.cli import cli
from ksl_patch.cli.build import build as build_command
from ksl_patch.hf import load_base
from ksl_patch.patch import TemplateMeta
from ksl_patch.train.config import BuildConfig


def run(*arguments):
    """A command in a process of its own: exit code, stdout, stderr."""
    done = subprocess.run([sys.executable, "-m", "ksl_patch", *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def patch_file(base_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("patch") / "es.safetensors"
    model, tokenizer = load_base(str(base_folder))
    g = torch.Generator().manual_seed(0)
    ids = [300, 301, 302]
    template = TemplateMeta(text="{source} =>", chat=False)
    patch = Patch.from_model(
        model, ids, torch.randn(3, 32, generator=g), name="es", language="es", tokenizer=tokenizer, template=template
    )
    patch.save(path)
    return path


@pytest.mark.slow
def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, click, ksl_patch; from ksl_patch.cli import cli; "
        "context = click.Context(cli); [cli.get_command(context, name) for name in cli.list_commands(context)]; "
        "cli(['--help'], standalone_mode=False); "
        "heavy = {'torch', 'transformers', 'vllm', 'peft', 'matplotlib', 'numba', 'scipy'} & set(sys.modules); "
        "assert not heavy, heavy; "
        "ksl_patch.Patch, ksl_patch.ks_test, ksl_patch.identify, ksl_patch.ks_ticket; "
        "heavy = {'transformers', 'vllm', 'peft', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_options_of_build_default_to_what_a_config_does():
    required = {"base": "m", "pairs": "p.jsonl", "language": "es"}
    arguments = [part for name, value in required.items() for part in (f"--{name}", value)]
    options = build_command.make_context("build", [*arguments, "-o", "es.safetensors"]).params
    config = dataclasses.asdict(BuildConfig(name="es", **required))
    # `--steps auto` is the other.
    assert config.keys() - options.keys() == {"cap", "auto_steps"}
    # These three are worked out from several options.
    for name in config.keys() & options.keys() - {"name", "columns", "alpha"}:
        assert options[name] == config[name], name


def test_inspect_shows_the_rows_as_text(patch_file):
    result = CliRunner().invoke(cli, ["inspect", str(patch_file)])
    patch = Patch.load(patch_file)
    assert result.exit_code == 0
    assert patch.digest in result.output.replace("\n", "")
    for text in patch.meta.tokens:
        assert json.dumps(text, ensure_ascii=False) in result.output
    shown = json.loads(CliRunner().invoke(cli, ["inspect", str(patch_file), "--json"]).output)
    assert shown["digest"] == patch.digest
    assert [row["token_id"] for row in shown["rows"]] == [300, 301, 302]
    change = (patch.rows - patch.base_rows).norm(dim=1).tolist()
    assert [row["change_norm"] for row in shown["rows"]] == pytest.approx(change)


@pytest.mark.slow
def test_verify_exits_with_0_or_with_1_and_the_reason(patch_file, base_folder, tmp_path):
    assert run("verify", patch_file)[0] == 0
    code, out, _ = run("verify", patch_file, "--base", base_folder, "--json")
    assert code == 0
    assert json.loads(out)["valid"] is True
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    load_base(str(base_folder))[1].save_pretrained(tmp_path / "other")
    code, out, err = run("verify", patch_file, "--base", tmp_path / "other")
    assert (code, out) == (1, "")
    assert err.startswith("Error: 3 of the patch's 3 base rows differ")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(patch_file.read_bytes()[:-1])
    code, out, _ = run("verify", damaged, "--json")
    assert code == 1
    assert "not a valid safetensors file" in json.loads(out)["reason"]


@pytest.mark.slow
def test_generate_runs_a_mixed_batch(patch_file, base_folder):
    code, out, err = run(
        "generate", "--base", base_folder, "--patch", "base", "--patch", patch_file, "--prompt", "The cat",
        "--prompt", "The cat", "--max-new-tokens", 8, "--json",
    )  # fmt: skip
    assert code == 0, err
    base, patched = map(json.loads, out.splitlines())
    assert base["patch"] is None
    assert patched["patch"] == str(patch_file)
    assert err.count("Warning: prompt 2 is not in the template") == 1
    code, out, err = run(
        "generate", "--base", base_folder, "--patch", patch_file, "--prompt", "The cat", "--apply-template",
        "--max-new-tokens", 8,
    )  # fmt: skip
    assert code == 0
    # A tiny patch of rows that neither the template nor the prompt has.
    assert err.startswith(
        f"Loading torch and transformers ...\nLoading {base_folder} ...\nWarning: prompt 1 has no token"
    )
    assert err.count("\n") == 3
    assert out.startswith(f"[{patch_file}] The cat\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["build", "--base", "m", "--pairs", "p.jsonl", "--language", "es", "-o", "no/such/p"], 2, "folder"),
        (["build", "--base", "m", "--pairs", "p.jsonl", "--language", "es", "-o", "{patch}"], 2, "add --force"),
        (["build", "--base", "m", "--pairs", "p.jsonl", "--language", "es", "-o", "{new}"], 1, "no such file"),
        (["build", "--base", "m", "--pairs", "p.jsonl", "--language", "es", "-o", "{new}", "--selection", "random"], 2,
         "needs --top-k"),
        (["build", "--base", "m", "--pairs", "p", "--language", "es", "-o", "{new}", "--columns", "a"], 2, "two names"),
        (["generate", "--base", "m", "--prompt", "a", *["--patch", "q"] * 3], 2, "3 --patch for 1"),
        (["generate", "--base", "m", "--prompt", ""], 2, "is empty"),
        (["generate", "--base", "m/x", "--prompt", "a"], 1, "cannot load the base m/x"),
    ],
)  # fmt: skip
def test_errors_are_one_line_on_stderr(arguments, code, message, patch_file, tmp_path):
    names = {"{patch}": str(patch_file), "{new}": str(tmp_path / "new.safetensors")}
    exit_code, out, err = run_cli(*(names.get(a, a) for a in arguments))
    assert (exit_code, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    if code == 1:
        *phases, error = err.splitlines()
        assert error.startswith("Error: ")
        assert all(line.startswith("Loading ") for line in phases)


def test_debug_shows_the_traceback():
    code, _, err = run("inspect", "none.safetensors", "--debug")
    assert code == 1
    assert "Traceback" in err


def test_shell_completion_offers_commands_and_options():
    environment = os.environ | {
        "_KSL_PATCH_COMPLETE": "bash_complete",
        "COMP_WORDS": "ksl-patch ver",
        "COMP_CWORD": "1",
    }
    done = subprocess.run([sys.executable, "-m", "ksl_patch"], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "plain,verify"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "PATCH", "-o", "none/P2"], "the folder none does not exist"),
        (["merge", "PATCH", "PATCH", "-o", "none/C"], "the folder none does not exist"),
        (["import", "adapter", "--base", "m", "-o", "PATCH"], "exists; add --force to replace it"),
        (["eval", "PATCH", "--columns", "a,b"], "--columns are those of --test"),
        (["eval", "PATCH", "--base", "m", "--test", "t.jsonl", "--pairs", "p.jsonl"], "without its build"),
        (["serve", "m", "--json"], "--json prints the command of --dry-run"),
    ],
)
def test_what_would_be_ignored_or_fail_at_the_end_is_said_first(patch_file, arguments, message):
    code, _, err = run_cli(*(patch_file if each == "PATCH" else each for each in arguments))
    assert code == 2
    assert message in err
