"""What a newcomer trips over: names that move, files of prompts, interrupts, mistyped words."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import run_cli, tiny_llama
from test_build import Recorder
from test_hf import IDS, some_patch

from ksl_patch import Patch, attach
from ksl_patch.errors import PatchError, RunError
from ksl_patch.hf import load_base
from ksl_patch.patch import TemplateMeta
from ksl_patch.store.local import Store
from ksl_patch.store.references import resolve
from ksl_patch.train.build import Build
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.ticket_checks import report_weak_rows


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KSL_PATCH_HOME", str(tmp_path / "home"))
    return tmp_path


def save(model, seed, file, **meta):
    patch = some_patch(model, seed, IDS[:3]).with_meta(**meta)
    patch.save(file)
    return patch


def test_a_name_of_the_store_moves_to_another_language_or_base_when_told(home, model):
    first = save(model, 1, home / "a.safetensors", name="es", language="es")
    second = save(model, 2, home / "b.safetensors", name="es", language="es")
    save(model, 3, home / "c.safetensors", name="es", language="ru")
    save(tiny_llama(seed=4), 4, home / "d.safetensors", name="es", language="es")
    assert (
        run_cli("add", home / "a.safetensors")[1] == f"es: {first.digest}, the name inside {home / 'a.safetensors'}\n"
    )
    assert (
        run_cli("add", home / "a.safetensors")[1] == f"es: {first.digest}, the name inside {home / 'a.safetensors'}\n"
    )
    assert run_cli("add", home / "b.safetensors")[1].startswith(f"es: {second.digest}, was {first.digest[:12]}")
    for other in ("c", "d"):
        code, _, err = run_cli("add", home / f"{other}.safetensors")
        assert code == 2
        assert f"the store's name es is of another patch (es on a base, {second.digest[:12]})" in err
        assert Store().digest("es") == second.digest
    # Of several files none is added where one is refused.
    before = len(Store().entries())
    assert run_cli("add", home / "a.safetensors", home / "c.safetensors")[0] == 2
    assert (len(Store().entries()), Store().digest("es")) == (before, second.digest)
    code, out, _ = run_cli("add", home / "c.safetensors", "--force")
    assert code == 0
    assert f", was {second.digest[:12]}" in out


def test_the_store_keeps_what_was_measured_whichever_came_first(home, model):
    plain, measured = home / "plain.safetensors", home / "measured.safetensors"
    save(model, 1, plain)
    save(model, 1, measured, evaluation={"pairs": 4})
    for order in ([plain, measured], [measured, plain]):
        store = Store(home / f"store of {order[0].stem}")
        for file in order:
            store.add(Patch.load(file), source=file)
        (entry,) = store.entries()
        assert store.get(entry.digest).meta.evaluation == {"pairs": 4}


@pytest.mark.slow
def test_a_file_of_prompts_gives_an_answer_a_line(home, base_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    template = TemplateMeta(text="Say: {source} Now:", chat=False)
    save(model, 1, home / "es.safetensors", template=template)
    prompts = ["The cat.", "", "The dog sees.", "A", "B", "C"]
    (home / "p.txt").write_text("\n".join(prompts) + "\n\n")
    common = ["generate", "--base", base_folder, "--apply-template", "--max-new-tokens", 4]
    patched = [*common, "--patch", home / "es.safetensors"]
    alone = {text: json.loads(run_cli(*patched, "--prompt", text, "--json")[1])["text"] for text in prompts if text}
    for batch in (1, 2, 16):
        code, out, err = run_cli(*patched, "--prompts", home / "p.txt", "--batch-size", batch)
        assert code == 0, err
        assert out.split("\n")[:-1] == [" ".join(alone[text].split()) if text else "" for text in prompts]
    assert "cut at --max-new-tokens 4" in err
    code, out, _ = run_cli(*patched, "--prompts", home / "p.txt", "--json")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == [text for text in prompts if text]
    command = [sys.executable, "-m", "ksl_patch", *map(str, patched), "--prompts", "-"]
    done = subprocess.run(command, input="The cat.\n", capture_output=True, text=True, timeout=120)
    assert done.stdout == " ".join(alone["The cat."].split()) + "\n"
    # The base beside a patch is asked in the same words.
    both = ["--patch", "base", "--patch", home / "es.safetensors", "--prompt", "The cat.", "--prompt", "The cat."]
    base, _ = map(json.loads, run_cli(*common, *both, "--json")[1].splitlines())
    given = ["generate", "--base", base_folder, "--max-new-tokens", 4, "--prompt", "Say: The cat. Now:", "--json"]
    assert base["text"] == json.loads(run_cli(*given)[1])["text"]
    for bad, message in ((["--prompts", home / "none"], "No such file"), ([], "give prompts with --prompt")):
        code, _, err = run_cli(*common, *bad)
        assert code == 2
        assert message in err


def test_the_base_may_be_the_patch_s_own(home, base_folder, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    patch = some_patch(model, 1, IDS[:3])
    monkeypatch.chdir(base_folder.parent)
    patch.with_meta(base=replace(patch.meta.base, model_id=base_folder.name)).save(home / "es.safetensors")
    code, _, err = run_cli("generate", "--patch", home / "es.safetensors", "--prompt", "a", "--max-new-tokens", 2)
    assert code == 0, err
    monkeypatch.chdir(home)
    code, _, err = run_cli("generate", "--patch", home / "es.safetensors", "--prompt", "a")
    assert code == 2
    assert f"name the base with --base: the patches say {base_folder.name}" in err


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_an_interrupt_keeps_the_step_it_is_in(home, base_folder, pairs_file, interrupt):
    command = [sys.executable, "-m", "ksl_patch", "build", "--base", base_folder, "--pairs", pairs_file, "--language"]
    command += ["es", "-o", home / "es.safetensors", "--top-k", 3, "--embed-steps", 4000, "--steps", 2, "--json"]
    command += ["--checkpoint-every", 4000, "--dev", 8, "--held-out", 8]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(interrupt, signal.SIG_DFL),  # tests may run in the background, or under nohup
    )  # fmt: skip
    step = 0
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "step" and event["step"] >= 3:
            step = event["step"]
            process.send_signal(interrupt)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    events = [json.loads(line)["event"] for line in out.splitlines()]
    assert [event for event in events if event != "step"][-2:] == ["stopping", "stopped"]
    assert "end" not in events
    assert "Interrupted. What was finished is kept" in err
    again = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in again.stdout:
        event = json.loads(line)
        if event["event"] in ("resumed", "step"):
            break
    again.kill()
    again.communicate()
    assert event["event"] == "resumed"
    assert event["step"] >= step


def test_a_folder_does_not_hide_a_name_of_the_store(home, model, monkeypatch):
    patch = save(model, 1, home / "a.safetensors", name="sv", language="sv")
    run_cli("add", home / "a.safetensors")
    monkeypatch.chdir(home)
    (home / "sv").mkdir()
    assert resolve("sv").patch.digest == patch.digest
    code, _, err = run_cli("inspect", "home")
    assert code == 1
    assert "home is a folder, and the local store has no such name: name a patch file in it." in err
    # A file goes before the store, whatever its name.
    (home / "sv").rmdir()
    other = some_patch(model, 2, IDS[:3])
    other.save(home / "sv")
    assert resolve("sv").patch.digest == other.digest
    # In Python too, and the handle says what it has.
    (home / "sv").unlink()
    with attach(model) as handle:
        assert repr(handle) == "<PatchHandle of LlamaForCausalLM: no patches>"
        assert handle.load("sv") == "sv"
        assert handle.digest("sv") == patch.digest
        assert repr(handle) == f"<PatchHandle of LlamaForCausalLM: sv {patch.digest[:12]}>"
        with pytest.raises(PatchError, match="no such name in the local store"):
            handle.load("sw")
    assert repr(handle).startswith("<PatchHandle of LlamaForCausalLM, detached:")
    code, out, _ = run_cli("add", home / "a.safetensors")
    assert out == f"sv: {patch.digest}, the name inside {home / 'a.safetensors'}\n"


def test_two_builds_to_one_file_do_not_overwrite(home, model, base_folder, pairs_file, monkeypatch):
    output, patch = home / "es.safetensors", some_patch(model, 1, IDS[:3])
    monkeypatch.setattr("ksl_patch.train.build.build", lambda *_: (output.write_bytes(b"another's"), patch)[1])
    command = ["build", "--base", base_folder, "--pairs", pairs_file, "--language", "es", "-o", output, "--top-k", 3]
    command += ["--embed-steps", 2, "--steps", 2, "--dev", 8, "--held-out", 8]
    code, _, err = run_cli(*command)
    assert code == 1
    assert f"{output} was written by something else meanwhile" in err
    assert output.read_bytes() == b"another's"
    assert run_cli(*command, "--force")[0] == 0


@pytest.mark.slow
def test_a_patch_says_when_it_was_made_and_the_same_build_says_the_same(home, base_folder, pairs_file, monkeypatch):
    command = ["build", "--base", base_folder, "--pairs", pairs_file, "--language", "es", "--resume", home / "run"]
    command += ["--embed-steps", 2, "--steps", 2, "--dev", 8, "--held-out", 8]
    created = []
    for day, k in enumerate((3, 4, 3)):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(86400 * day))
        assert run_cli(*command, "--top-k", k, "-o", home / "es.safetensors", "--force")[0] == 0
        created.append(Patch.load(home / "es.safetensors").meta.created[:10])
    assert created == ["1970-01-01", "1970-01-02", "1970-01-01"]
    # Of other pairs it is another patch, whatever its settings.
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(86400 * 9))
    moved = home / "moved.jsonl"
    moved.write_text(pairs_file.read_text().replace("gato", "perro"))
    command[command.index(pairs_file)] = moved
    assert run_cli(*command, "--top-k", 3, "-o", home / "es.safetensors", "--force")[0] == 0
    assert Patch.load(home / "es.safetensors").meta.created[:10] == "1970-01-10"


@pytest.mark.slow
def test_max_pairs_counts_what_is_trained_on(home, base_folder):
    long = "word " * 200
    lines = [{"source": f"The cat {i} {long if i % 2 else ''}", "target": f"El gato {i}"} for i in range(120)]
    (home / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["build", "--base", base_folder, "--pairs", home / "p.jsonl", "--language", "es", "--top-k", 3]
    command += ["--embed-steps", 2, "--steps", 2, "--dev", 8, "--held-out", 8, "--max-pairs", 20, "--max-length", 96]
    code, _, err = run_cli(*command, "-o", home / "es.safetensors")
    assert code == 0
    assert "20 pairs to train" in err
    assert "training pairs were left out: longer than 96 tokens" in err
    assert Patch.load(home / "es.safetensors").meta.training.pairs == 20
    # And eval finds the same training pairs again.
    assert run_cli("eval", home / "es.safetensors", "--controls", "none", "--max-new-tokens", 2)[0] == 0


@pytest.mark.slow
def test_the_base_has_an_id_of_the_hub_where_one_is_given(home, base_folder, pairs_file):
    folder = home / "mine"
    shutil.copytree(base_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/base"}))
    command = ["build", "--base", folder, "--pairs", pairs_file, "--language", "es", "--top-k", 3, "--force"]
    command += ["--embed-steps", 2, "--steps", 2, "--dev", 8, "--held-out", 8, "-o", home / "es.safetensors"]
    code, _, err = run_cli(*command)
    assert code == 0
    assert "call its base mine, after its folder; to publish it, --base-model ID says its id on the Hub" in err
    assert "its config.json names org/base, which may be what it was tuned from" in err
    assert Patch.load(home / "es.safetensors").meta.base.model_id == "mine"
    code, _, err = run_cli(*command, "--base-model", "org/own")
    assert code == 0
    assert "after its folder" not in err
    assert Patch.load(home / "es.safetensors").meta.base.model_id == "org/own"
    for bad in ("own", "a/b/c", "org/../x"):
        code, _, err = run_cli(*command, "--base-model", bad)
        assert code == 1
        assert "is not a model's id on the Hub" in err


@pytest.mark.parametrize(("row", "said"), [(" gato", True), ("\n", False)])
def test_a_ticket_outside_the_template_is_said(tmp_path, base_folder, pairs_file, row, said):
    config = {"base": str(base_folder), "pairs": str(pairs_file), "language": "es", "name": "es", "steps": 2, "dev": 8}
    made = Build(BuildConfig(**config, held_out=8, rows=(row,)), tmp_path, Recorder())
    report_weak_rows(made, made.ticket())
    assert ("outside_template" in [event for event, *_ in made.reporter.notes]) is said


@pytest.mark.slow
def test_nohup_is_respected(home, base_folder, pairs_file):
    command = [sys.executable, "-m", "ksl_patch", "build", "--base", base_folder, "--pairs", pairs_file, "--language"]
    command += ["es", "-o", home / "es.safetensors", "--top-k", 3, "--embed-steps", 40, "--steps", 2, "--json"]
    command += ["--dev", 8, "--held-out", 8]
    process = subprocess.Popen(["nohup", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if json.loads(line)["event"] == "step":
            process.send_signal(signal.SIGHUP)
            break
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "stopping" not in out
    assert (home / "es.safetensors").is_file()


def test_mistyped_words_are_answered_with_the_right_one(base_folder):
    given = ["build", "--base", base_folder, "--language", "Korean", "-o", "x.safetensors", "--pairs", "a", "b"]
    assert (
        "there is no option before 'b': write --pairs, or --beside, before each of several files." in run_cli(*given)[2]
    )
    assert "'Korean' is not a known language's tag; 'Korean' is 'ko'." in run_cli(*given[:-1])[2]
    code, _, err = run_cli("bulid")
    assert code == 2
    assert "No such command 'bulid'. Did you mean build?" in err
    assert "Did you mean" not in run_cli("xyzzy")[2]
    for device in ("gpu", "cuda:7", "tpu") + (() if torch.cuda.is_available() else ("cuda",)):
        with pytest.raises(RunError, match=f"there is no device '{device}' here: use cpu"):
            load_base(str(base_folder), device=device)
