"""The local store: contents by digest, names for them, many processes at once, and what a crash leaves."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import run_cli
from store_workers import add_forever, add_many
from test_hf import some_patch

from ksl_patch import Patch
from ksl_patch.errors import PatchError
from ksl_patch.store.local import Store, default_root
from ksl_patch.store.references import load


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KSL_PATCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def store(home):
    return Store()


def test_contents_are_kept_by_digest(model, store):
    patch = some_patch(model, 1)
    path = store.add(patch)
    assert path.name == f"{patch.digest}.safetensors"
    before = path.stat()
    assert store.add(patch.with_meta(name="another")) == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert store.get(patch.digest).digest == patch.digest
    some_patch(model, 2).save(path)
    with pytest.raises(PatchError, match="delete the file and add the patch again"):
        store.get(patch.digest)
    path.write_bytes(b"x" * 100)
    with pytest.raises(PatchError, match=patch.digest):
        store.get(patch.digest)


def test_a_name_is_an_alias_that_may_move(model, store):
    first, second = some_patch(model, 1), some_patch(model, 2)
    store.add(first, "es")
    store.add(first, "spanish")
    assert store.names() == {"es": first.digest, "spanish": first.digest}
    store.add(second, "es")
    assert store.get("es").digest == second.digest
    assert [entry.names for entry in store.entries()] == [("es",), ("spanish",)]
    assert store.remove("spanish") == first.digest
    assert store.gc(dry_run=True)[0].digest == first.digest
    assert store.path(first.digest).is_file()
    assert [entry.digest for entry in store.gc()] == [first.digest]
    assert not store.path(first.digest).exists()
    assert store.get("es").digest == second.digest


@pytest.mark.parametrize("bad", ["", "..", "../x", "a/b", ".hidden", "x" * 97])
def test_names_stay_inside_the_store(model, store, bad):
    with pytest.raises(PatchError, match="is not a patch name"):
        store.add(some_patch(model, 1), bad)
    with pytest.raises(PatchError, match="is not a patch name"):
        store.get(bad)


def test_what_is_not_there_is_said(model, store):
    with pytest.raises(PatchError, match="no patch named"):
        store.get("es")
    with pytest.raises(PatchError, match="no patch named"):
        store.remove("es")
    with pytest.raises(PatchError, match="add it again"):
        store.get("0" * 64)
    with pytest.raises(PatchError, match="not a digest"):
        store.path("../../etc/passwd")
    store.add(some_patch(model, 1), "es")
    (store.root / "names" / "es").write_text("nonsense")
    with pytest.raises(PatchError, match="holds no digest"):
        store.get("es")


def test_references_are_paths_digests_and_names(model, store, tmp_path, monkeypatch):
    patch = some_patch(model, 1)
    file = tmp_path / "es.safetensors"
    patch.save(file)
    store.add(patch, "es")
    for reference in ("es", patch.digest, str(file)):
        assert load(reference).digest == patch.digest
    other = some_patch(model, 2)
    monkeypatch.chdir(tmp_path)
    other.save("es")  # a file here goes before a name there
    assert load("es").digest == other.digest
    with pytest.raises(PatchError, match="cannot read"):
        load("nobody")


def test_gc_waits_for_no_server_but_refuses(model, store):
    store.add(some_patch(model, 1))
    code = "import time; from ksl_patch.store.local import Store; Store().hold(); print(1, flush=True); time.sleep(60)"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        server.stdout.readline()
        assert len(store.gc(dry_run=True)) == 1
        with pytest.raises(PatchError, match="a server reads patches"):
            store.gc()
    finally:
        server.kill()
        server.wait()
    assert len(store.gc()) == 1


@pytest.mark.slow
def test_several_processes_write_at_once(model, home, tmp_path):
    files = [tmp_path / f"{seed}.safetensors" for seed in range(20)]
    for seed, file in enumerate(files):
        some_patch(model, seed).save(file)
    workers = [prepared().Process(target=add_many, args=(home, files[n : n + 12])) for n in (0, 4, 8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    store = Store(home)
    assert len(store.entries()) == 20
    for entry in store.entries():
        assert store.get(entry.digest).digest == entry.digest
    assert store.get("shared").digest in {some_patch(model, seed).digest for seed in (11, 15, 19)}


def prepared():
    """How processes begin that have what they need imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["store_workers"])
    return context


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_store_that_can_be_read(model, home, tmp_path):
    (tmp_path / "files").mkdir()
    for seed in range(40):
        some_patch(model, seed).save(tmp_path / "files" / f"{seed:02}.safetensors")
    for turn in range(4):
        worker = prepared().Process(target=add_forever, args=(home, tmp_path / "files"))
        worker.start()
        while not (home / "names").is_dir():
            time.sleep(0.01)
        time.sleep(0.2 + 0.037 * turn)
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        store = Store(home)
        for name, digest in store.names().items():
            assert store.get(name).digest == digest
        for entry in store.entries():
            assert store.get(entry.digest).digest == entry.digest
        store.gc()  # the lock went with the process
    left = {file.name for folder in ("patches", "names") for file in (home / folder).iterdir()}
    assert not any(name.startswith(".") for name in left)


def test_the_store_that_cannot_be_written_is_named(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(PatchError, match="cannot make"):
        Store(tmp_path / "file" / "home").add(some_patch(model, 1))


def test_the_commands(model, home, tmp_path):
    for name, seed in (("es", 1), ("fr", 2)):
        some_patch(model, seed).with_meta(name=name, language=name).save(tmp_path / f"{name}.safetensors")
    code, out, _ = run_cli("add", tmp_path / "es.safetensors", tmp_path / "fr.safetensors", "--json")
    added = [json.loads(line) for line in out.splitlines()]
    assert (code, [entry["name"] for entry in added]) == (0, ["es", "fr"])
    code, out, _ = run_cli("list", "--json")
    listed = [json.loads(line) for line in out.splitlines()]
    assert [(e["names"], e["language"], e["digest"]) for e in listed] == [
        (["es"], "es", added[0]["digest"]), (["fr"], "fr", added[1]["digest"]),
    ]  # fmt: skip
    code, out, _ = run_cli("path", "es")
    assert Patch.load(out.strip()).digest == added[0]["digest"]
    assert "es" in run_cli("list")[1]
    assert json.loads(run_cli("inspect", "es", "--json")[1])["digest"] == added[0]["digest"]
    assert json.loads(run_cli("verify", added[1]["digest"], "--json")[1])["valid"]
    assert not json.loads(run_cli("verify", "nobody", "--json")[1])["valid"]
    assert run_cli("remove", "es")[0] == 0
    code, out, _ = run_cli("gc", "--json")
    assert json.loads(out)["deleted"] == [added[0]["digest"]]
    for arguments in (("path", "es"), ("remove", "es"), ("add", tmp_path / "none"), ("path", "../x")):
        code, out, err = run_cli(*arguments)
        assert (code, out) == (1, "")
        assert len(err.strip().splitlines()) == 1
    file = Store().path(added[1]["digest"])
    file.write_bytes(file.read_bytes()[:-5] + b"12345")
    damaged = json.loads(run_cli("list", "--json")[1])
    assert added[1]["digest"] in damaged["damaged"]


def test_the_default_is_the_user_s_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("KSL_PATCH_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "ksl_patch"
