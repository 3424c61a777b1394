"""What a newcomer trips over: names that move, files of prompts, interrupts, mistyped words."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import run_cli, tiny_llama
from test_hf import IDS, some_patch

from ksl_patch import Patch
from ksl_patch.errors import RunError
from ksl_patch.hf import load_base
from ksl_patch.patch import TemplateMeta
from ksl_patch.store.local import Store


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
    assert run_cli("add", home / "a.safetensors")[1] == f"es: {first.digest}\n"
    assert run_cli("add", home / "a.safetensors")[1] == f"es: {first.digest}\n"
    assert run_cli("add", home / "b.safetensors")[1] == f"es: {second.digest}, was {first.digest[:12]}\n"
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


def test_an_interrupt_keeps_the_step_it_is_in(home, base_folder, pairs_file):
    command = [sys.executable, "-m", "ksl_patch", "build", "--base", base_folder, "--pairs", pairs_file, "--language"]
    command += ["es", "-o", home / "es.safetensors", "--top-k", 3, "--embed-steps", 4000, "--steps", 2, "--json"]
    command += ["--checkpoint-every", 4000, "--dev", 8, "--held-out", 8]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    step = 0
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "step" and event["step"] >= 3:
            step = event["step"]
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
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


def test_mistyped_words_are_answered_with_the_right_one(base_folder):
    code, _, err = run_cli("bulid")
    assert code == 2
    assert "No such command 'bulid'. Did you mean build?" in err
    assert "Did you mean" not in run_cli("xyzzy")[2]
    for device in ("gpu", "cuda:7", "tpu") + (() if torch.cuda.is_available() else ("cuda",)):
        with pytest.raises(RunError, match=f"there is no device '{device}' here: use cpu"):
            load_base(str(base_folder), device=device)
