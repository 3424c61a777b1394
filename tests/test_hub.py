"""The Hub: the real huggingface_hub client against a server on loopback that speaks the Hub's API."""

import json
import os
import subprocess
import sys

import huggingface_hub
import pytest
from conftest import run_cli
from hub_server import Repo
from huggingface_hub import constants
from test_hf import some_patch
from test_report import evaluation

from ksl_patch import Patch, attach
from ksl_patch.errors import HubError
from ksl_patch.patch.evaluation import write
from ksl_patch.store import hub as hub_store
from ksl_patch.store import sign
from ksl_patch.store.hub import HubReference, fetch
from ksl_patch.store.local import Store
from ksl_patch.store.lock import check_locked, write_lock
from ksl_patch.store.references import load


@pytest.fixture
def file(tmp_path, model):
    path = tmp_path / "es.safetensors"
    some_patch(model, 1).save(path)
    return path


@pytest.fixture
def published(hub, file):
    """A repository with one patch."""
    repo = hub.repos["org/es"] = Repo()
    repo.commit({"README.md": b"# es\n", "es.safetensors": file.read_bytes()})
    return repo


def downloads(hub):
    return [(path, range_) for method, path, range_ in hub.seen if method == "GET" and "/resolve/" in path]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://org/repo", ("org/repo", None, None)),
        ("org/repo@v1.0/es.safetensors", ("org/repo", "v1.0", "es.safetensors")),
        ("hf://org/repo@refs/pr/3/a/es.safetensors", ("org/repo", "refs/pr/3", "a/es.safetensors")),
    ],
)
def test_a_reference(text, parts):
    found = HubReference.parse(text)
    assert (found.repo, found.revision, found.file) == parts
    assert HubReference.parse(str(found)) == found


@pytest.mark.parametrize(
    "text",
    ["hf://", "org", "org/repo/es.bin", "org/repo/../../es.safetensors", "org/repo@../x/es.safetensors", "org/repo@",
     "../repo", "org/.git/es.safetensors", "org/repo/a\0.safetensors", "org/repo/" + "a/" * 9 + "es.safetensors"],
)  # fmt: skip
def test_what_is_no_reference(text):
    with pytest.raises(HubError, match="is not a patch on the Hub"):
        HubReference.parse(text)


def test_push_then_pull(hub, file):
    code, out, err = run_cli("push", file, "org/langs", "--base-model", "org/base", "--private", "--json")
    assert code == 0, err
    assert json.loads(out)["reference"] == "hf://org/langs/es.safetensors"
    assert hub.repos["org/langs"].private
    code, out, err = run_cli("pull", "org/langs", "--name", "spanish")
    assert code == 0, err
    patch = Patch.load(file)
    assert Store().get("spanish").digest == patch.digest
    assert out.startswith(f"spanish: {patch.digest}, from hf://org/langs@")


def test_the_card_says_what_the_patch_says_and_keeps_the_others(hub, file, model):
    licensed = Patch.load(file).with_meta(language="pt-BR", licence="CC-BY-4.0", evaluation={"loss_base": 4.75})
    licensed.save(file)
    fr = file.with_name("fr.safetensors")
    some_patch(model, 2).with_meta(name="fr", language="fr").save(fr)
    for each in (file, fr, file):
        code, _, err = run_cli("push", each, "org/langs", "--base-model", "org/base")
        assert code == 0, err
    text = hub.repos["org/langs"].read("README.md")
    card = huggingface_hub.ModelCard(text)
    assert card.data.base_model == "org/base"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert card.data.language == ["pt", "fr"]
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "ksl_patch")
    assert text.count("## es") == text.count("## fr") == 1
    assert licensed.digest in text
    assert "| loss_base | 4.75 |" in text
    assert "ksl-patch serve org/base --patch es=hf://org/langs/es.safetensors" in text


def test_the_card_has_the_patch_beside_its_controls(hub, file):
    Patch.load(file).with_meta(evaluation=write(evaluation())).save(file)
    code, _, err = run_cli("push", file, "org/langs", "--base-model", "org/base")
    assert code == 0, err
    text = hub.repos["org/langs"].read("README.md")
    assert "On 64 held-out pairs, greedy, at most 60 new tokens; in brackets the 95% interval" in text
    lines = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines() if line.count("|") == 9
    }
    assert lines["base"] == "4.700"
    assert lines["patch"] == "4.000 (-0.800 to -0.600)"
    assert list(lines)[2:] == [
        "base", "embedding tuned", "patch", "most frequent rows", "largest L2 change", "random rows",
        "random change, same norms",
    ]  # fmt: skip
    assert "- chrf: nrefs:1|case:mixed" in text


def test_the_cards_own_words_stay(hub, file):
    hub.repos["org/langs"] = Repo()
    hub.repos["org/langs"].commit({"README.md": b"---\nlicense: mit\ntags:\n- mine\n---\n\n# Mine\n\nMy words.\n"})
    assert run_cli("push", file, "org/langs", "--base-model", "org/base")[0] == 0
    text = hub.repos["org/langs"].read("README.md")
    assert "# Mine\n\nMy words.\n\n<!-- ksl_patch es.safetensors -->" in text
    assert huggingface_hub.ModelCard(text).data.tags == ["mine", "embedding-patch", "ks-lottery"]


def test_a_base_that_is_a_folder_has_to_be_named(hub, file):
    code, _, err = run_cli("push", file, "org/langs")
    assert code == 1
    assert "--base-model" in err


def test_a_pull_request(hub, published, file):
    code, out, _ = run_cli("push", file, "org/es", "--base-model", "org/base", "--create-pr", "--name", "es2")
    assert code == 0
    assert "discussions/1" in out
    assert "es2.safetensors" not in published.commits[published.refs["main"]]
    assert fetch("org/es@refs/pr/1/es2.safetensors").path.read_bytes() == file.read_bytes()


def test_signatures_travel(hub, file, tmp_path):
    key = sign.generate(tmp_path / "k")
    sign.sign(file, tmp_path / "k")
    other = tmp_path / "other"
    sign.generate(other)
    assert run_cli("push", file, "org/langs", "--base-model", "org/base")[0] == 0
    assert run_cli("pull", "org/langs", "--key", f"{other}.pub")[0] == 1
    assert Store().names() == {}
    assert run_cli("pull", "org/langs", "--key", tmp_path / "k.pub")[0] == 0
    path = Store().path(Patch.load(file).digest)
    assert sign.load_signed(path, key).digest == path.stem
    assert run_cli("verify", "hf://org/langs", "--key", tmp_path / "k.pub")[0] == 0
    run_cli("remove", Patch.load(file).meta.name)
    run_cli("gc")
    assert list(path.parent.iterdir()) == []


def test_a_reference_serves_where_a_path_does(hub, published, model):
    assert load("hf://org/es").digest == load("hf://org/es/es.safetensors").digest
    with attach(model) as handle:
        handle.load("hf://org/es", "es")
        assert handle.digest("es") == load("hf://org/es").digest


def test_a_commit_in_the_cache_is_not_asked_for_again(hub, published):
    pinned = fetch("org/es").reference
    assert pinned.revision == published.refs["main"]
    hub.seen.clear()
    assert fetch(str(pinned)).reference == pinned
    assert hub.seen == []


def test_offline_it_comes_from_the_cache(hub, published, file, monkeypatch):
    pinned = fetch("org/es").reference
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("org/es").reference == pinned
    with pytest.raises(HubError, match="org/fr is not in the cache, and the Hub cannot be asked"):
        fetch("org/fr")
    assert "HF_HUB_OFFLINE is set" in run_cli("push", file, "org/es", "--base-model", "org/base")[2]


def test_a_hub_that_is_away(hub, published):
    pinned = fetch("org/es").reference
    hub.close()
    assert fetch(str(pinned)).reference == pinned


def test_a_cut_download_continues(hub, published, file, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    hub.once("GET", "/resolve/main/es.safetensors", "cut", 100)
    assert fetch("org/es").path.read_bytes() == file.read_bytes()
    assert [range_ for path, range_ in downloads(hub) if path.endswith("es.safetensors")] == [None, "bytes=100-"]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["/tree/", "/resolve/"])
def test_a_busy_hub_is_asked_again_when_it_says(hub, published, file, part):
    hub.once("GET", part, "status", 429, {"Retry-After": "0"}, "Too many requests", times=2)
    assert fetch("org/es").path.read_bytes() == file.read_bytes()


def test_a_content_that_is_not_what_the_hub_lists(hub, published, file):
    hub.once("GET", "/resolve/main/es.safetensors", "wrong")
    with pytest.raises(HubError, match="it was dropped, so try again"):
        fetch("org/es")
    assert fetch("org/es").path.read_bytes() == file.read_bytes()


def test_a_file_too_large_is_not_fetched(hub, published, monkeypatch):
    monkeypatch.setattr(hub_store, "MAX_BYTES", 1000)
    with pytest.raises(HubError, match=r"no patch is above 1,000"):
        fetch("org/es")
    assert downloads(hub) == []


def test_only_safetensors_are_fetched(hub, published):
    published.commit({"model.py": b"raise SystemExit", "evil.pkl": b"x"})
    fetch("org/es")
    assert {path.rpartition("/")[2] for path, _ in downloads(hub)} == {"es.safetensors"}


def test_what_the_hub_has_against_it_is_said(hub, published, file, monkeypatch):
    published.commit({"fr.safetensors": file.read_bytes()})
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    hub.repos["org/private"], hub.repos["org/gated"] = Repo(private=True), Repo(gated=True)
    hub.repos["org/gated"].commit({"es.safetensors": file.read_bytes()})
    for reference, reason in (
        ("org/none", "the Hub has no org/none for you"),
        ("org/private", "sign in with `hf auth login` or set HF_TOKEN"),
        ("org/gated", "org/gated is gated: Access to model org/gated is restricted. Ask for access"),
        ("org/es@v9", "org/es has no revision v9"),
        ("org/es/de.safetensors", "has no de.safetensors there; it has es.safetensors, fr.safetensors"),
        ("org/es", "say which, as in hf://org/es/NAME.safetensors"),
    ):
        code, out, err = run_cli("pull", reference)
        assert (code, out) == (1, ""), reference
        assert reason in err, (reference, err)
        assert err.count("\n") == 1
    code, _, err = run_cli("push", file, "org/es", "--base-model", "org/base")
    assert code == 1
    assert "Invalid username or password" in err


def test_a_forged_token_is_said(hub, published):
    hub.once("GET", "/tree/", "status", 401, {}, "Invalid credentials in Authorization header", times=9)
    assert "the token is not valid" in run_cli("pull", "org/es")[2]


def test_what_is_no_patch_is_refused(hub, published):
    published.commit({"es.safetensors": b"\x08\0\0\0\0\0\0\0{}      "})
    code, _, err = run_cli("pull", "org/es")
    assert code == 1
    assert "not a patch" in err
    assert Store().names() == {}


def test_a_lock_holds_the_commit(hub, published, tmp_path, model):
    config = tmp_path / "patches.toml"
    config.write_text('base = "org/base"\n[patches]\nes = "hf://org/es/es.safetensors"\n')
    first = write_lock(config).patches["es"]
    assert first.revision == published.refs["main"]
    newer = tmp_path / "newer.safetensors"
    some_patch(model, 7).save(newer)
    published.commit({"es.safetensors": newer.read_bytes()})
    assert load("hf://org/es").digest == Patch.load(newer).digest != first.digest
    assert check_locked(config).patches == {"es": f"hf://org/es@{first.revision}/es.safetensors"}


@pytest.mark.slow
def test_as_a_user(hub, published, tmp_path, file):
    """In a process of its own, with the environment alone."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "ksl_patch", "pull", "org/es", "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["digest"] == Patch.load(file).digest
