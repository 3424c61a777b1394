"""Signatures in minisign's format: with minisign's own files, with minisign itself where it is, and against changes."""

import base64
import json
import shutil
import stat
import subprocess

import pytest
from conftest import run_cli
from test_hf import some_patch

from ksl_patch.errors import PatchError
from ksl_patch.store import sign

# Made by minisign 0.11: `minisign -G -W`, `minisign -S -m f` with f holding "a patch".
PUBLIC = (
    "untrusted comment: minisign public key 44109518C548728\nRWQoh1SMUQlBBFsIerjxXuS6zEJXGq6+lk7MkUKc93MLxs7mmMTJM/pk\n"
)
SECRET = """untrusted comment: minisign encrypted secret key
RWQAAEIyAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAKIdUjFEJQQQSDGykQA/GHy0sTrxYptbuiD0eZldBTtfDxdsBYMB+WlsIerjxXuS6zEJXGq6+lk7MkUKc93MLxs7mmMTJM/pkAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
"""
SIGNATURE = """untrusted comment: untrusted text
RUQoh1SMUQlBBA4TfjgbrSxR/Dz+GXtpKN5eQQyi4vIObVK5FBQDIu3WPJuNZaNWwThHZeHDbAVCn5G7z0b3PQd0dbe2laO2wAI=
trusted comment: trusted text
xiQL6mLc6hCnqkw0TRtBT+hb7QrDsdBpRZGnLjNwG1lyqrnytMizPeBJN7FdYB8Pgx+Wb4DP95nNg/6wGN+2CQ==
"""


@pytest.fixture
def theirs(tmp_path):
    """minisign's own files."""
    for name, text in (("k.pub", PUBLIC), ("k", SECRET), ("f", "a patch"), ("f.minisig", SIGNATURE)):
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def signed(model, tmp_path):
    file, key = tmp_path / "es.safetensors", tmp_path / "own"
    some_patch(model, 1).save(file)
    sign.generate(key)
    sign.sign(file, key)
    return file


def public(folder, name="own.pub"):
    return sign.PublicKey.load(folder / name)


def test_minisign_s_signature_and_key_are_taken(theirs):
    key = public(theirs, "k.pub")
    assert str(key) == "044109518C548728"
    assert sign.verify(theirs / "f", key) == "trusted text"
    sign.sign(theirs / "f", theirs / "k")
    assert "file:f" in sign.verify(theirs / "f", key)


@pytest.mark.skipif(
    shutil.which("minisign") is None, reason="minisign is not installed: its own files are tested above"
)
def test_minisign_takes_ours(signed):
    key = signed.parent / "own.pub"
    done = subprocess.run(["minisign", "-V", "-p", key, "-m", signed], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    signature = signed.with_name(signed.name + ".minisig")
    signature.unlink()
    subprocess.run(["minisign", "-S", "-s", signed.parent / "own", "-m", signed], check=True, capture_output=True)
    sign.verify(signed, public(signed.parent))


def test_a_secret_key_is_its_owner_s_and_is_not_replaced(signed):
    key = signed.parent / "own"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with pytest.raises(PatchError, match="a key is not replaced"):
        sign.generate(key)


def change(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("at", [0, 500, -1])
def test_a_changed_file_is_refused(signed, at):
    change(signed, at)
    with pytest.raises(PatchError, match="is not valid"):
        sign.verify(signed, public(signed.parent))


def test_a_changed_signature_is_refused(signed):
    path = signed.with_name(signed.name + ".minisig")
    text = path.read_text()
    lines = text.splitlines()
    for number in (1, 3):
        raw = bytearray(base64.b64decode(lines[number]))
        raw[-1] ^= 1
        path.write_text("\n".join([*lines[:number], base64.b64encode(raw).decode(), *lines[number + 1 :]]))
        with pytest.raises(PatchError, match="is not valid"):
            sign.verify(signed, public(signed.parent))
    path.write_text(text.replace("file:es", "file:fr"))  # the trusted comment is signed too
    with pytest.raises(PatchError, match="is not valid"):
        sign.verify(signed, public(signed.parent))
    for broken in ("", "x\ny\nz\n", text.replace("\nRU", "\nRW", 1), text.replace("=", "?")):
        path.write_text(broken)
        with pytest.raises(PatchError, match="minisig"):
            sign.verify(signed, public(signed.parent))
    path.unlink()
    with pytest.raises(PatchError, match="is not signed"):
        sign.verify(signed, public(signed.parent))


def test_another_key_is_named(signed, theirs):
    with pytest.raises(PatchError, match="with another key"):
        sign.verify(signed, public(theirs, "k.pub"))
    for bad in ("k", "f"):
        with pytest.raises(PatchError, match="minisign"):
            public(theirs, bad)
    locked = theirs / "locked"
    raw = bytearray(base64.b64decode(SECRET.splitlines()[1]))
    raw[2:4] = b"Sc"
    locked.write_text("comment\n" + base64.b64encode(raw).decode())
    with pytest.raises(PatchError, match="has a password"):
        sign.sign(signed, locked)


def test_the_commands(model, tmp_path, monkeypatch):
    monkeypatch.setenv("KSL_PATCH_HOME", str(tmp_path / "home"))
    file, key = tmp_path / "es.safetensors", tmp_path / "own"
    some_patch(model, 1).with_meta(name="es").save(file)
    code, out, _ = run_cli("keygen", "-o", key, "--json")
    assert (code, json.loads(out)["public"]) == (0, f"{key}.pub")
    serve = ("serve", "base", "--require-signature", f"{key}.pub", "--dry-run", "--json", "--patch")
    code, _, err = run_cli(*serve, file)
    assert (code, "is not signed" in err) == (1, True)
    assert run_cli("verify", file, "--key", f"{key}.pub")[0] == 1
    assert run_cli("sign", file, "--key", key)[0] == 0
    assert run_cli("verify", file, "--key", f"{key}.pub")[0] == 0
    code, out, err = run_cli(*serve, file)
    assert code == 0, err
    assert f"{key}.pub" in out
    code, _, err = run_cli(*serve, tmp_path)
    assert (code, "only patch files can be signed" in err) == (1, True)
    assert run_cli("add", file)[0] == 0  # the store keeps the signature
    assert run_cli(*serve, "es")[0] == 0
    some_patch(model, 2).with_meta(name="fr").save(file)
    assert run_cli("add", file.rename(tmp_path / "fr.safetensors"))[0] == 0
    code, _, err = run_cli(*serve, "fr")
    assert (code, "is not signed" in err) == (1, True)
    (tmp_path / "note.txt").write_text("x")
    code, _, err = run_cli("sign", tmp_path / "note.txt", "--key", key)
    assert (code, len(err.strip().splitlines())) == (1, 1)
