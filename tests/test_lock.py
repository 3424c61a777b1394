"""patches.toml and its lock: what was locked is what is served, or nothing is."""

import json

import pytest
from conftest import run_cli, tiny_llama
from test_hf import some_patch

from ksl_patch import Patch
from ksl_patch.store.local import Store


@pytest.fixture
def config(model, tmp_path, monkeypatch):
    monkeypatch.setenv("KSL_PATCH_HOME", str(tmp_path / "home"))
    some_patch(model, 1, [3, 4]).save(tmp_path / "es.safetensors")
    Store().add(some_patch(model, 2, [5]), "french")
    path = tmp_path / "patches.toml"
    path.write_text('base = "org/base"\n[patches]\nes = "es.safetensors"\nfr = "french"\n')
    return path


def serve(config, *more):
    return run_cli("serve", "--config", config, *more, "--dry-run", "--json")


def test_what_is_locked_is_served(config):
    code, out, err = run_cli("lock", config, "--json")
    assert code == 0, err
    digests = json.loads(out)["patches"]
    assert digests == {"es": Patch.load(config.parent / "es.safetensors").digest, "fr": Store().digest("french")}
    first = config.with_suffix(".lock").read_bytes()
    assert run_cli("lock", config)[0] == 0
    assert config.with_suffix(".lock").read_bytes() == first
    assert json.loads(first)["patches"]["es"]["reference"] == "es.safetensors"
    assert run_cli("lock", config, "--check")[0] == 0
    code, out, err = serve(config, "--locked", "--port", "9")
    assert code == 0, err
    command = json.loads(out)["command"]
    assert command[:3] == ["vllm", "serve", "org/base"]
    assert command[-2:] == ["--port", "9"]
    modules = [json.loads(text) for text in command if text.startswith('{"name"')]
    assert {module["name"]: module["path"].split("/")[-1].split(".")[0] for module in modules} == digests


def test_what_is_not_what_was_locked_is_refused(config, model):
    assert "there is no" in serve(config, "--locked")[2]
    assert run_cli("lock", config)[0] == 0
    text = config.read_text()
    config.write_text(text + 'sw = "french"\n')
    code, out, err = serve(config, "--locked")
    assert (code, out, "lock it again" in err) == (1, "", True)
    config.write_text(text)
    Store().add(some_patch(model, 9, [5]), "french")
    code, out, err = serve(config, "--locked")
    assert (code, out, "not what was locked" in err) == (1, "", True)
    assert run_cli("lock", config, "--check")[0] == 1
    assert serve(config)[0] == 0  # unlocked, the name's new content is served
    config.with_suffix(".lock").write_text("{}")
    assert "is not a lock" in serve(config, "--locked")[2]


def test_one_server_has_one_base(config):
    some_patch(tiny_llama(seed=7), 1, [3]).save(config.parent / "es.safetensors")
    code, _, err = run_cli("lock", config)
    assert (code, "2 different bases" in err) == (1, True)


@pytest.mark.parametrize(
    "text", ["", "base = 1", 'base = "x"\n[patches]\n"../x" = "y"\n', 'base = "x"\nother = 1\n', "\xff["]
)
def test_what_is_no_config_is_said_in_a_sentence(config, text):
    config.write_text(text, encoding="latin-1")
    for command in (("lock", config), ("serve", "--config", config, "--dry-run")):
        code, out, err = run_cli(*command)
        assert (code, out) == (1, "")
        assert "is not a list of patches" in err
        assert len(err.strip().splitlines()) == 1


def test_the_config_alone_says_what_is_served(config):
    assert run_cli("serve", "base", "--config", config, "--dry-run")[0] == 2
    assert run_cli("serve", "--dry-run")[0] == 2
    assert run_cli("serve", "--port", "9", "base", "--dry-run")[0] == 2
    assert run_cli("serve", "base", "--locked", "--dry-run")[0] == 2
