"""Detached signatures of patch files in minisign's format (https://jedisct1.github.io/minisign/): FILE.minisig.

Ed25519 over the BLAKE2b-512 hash of the file, with `cryptography`. Keys and signatures go both ways with minisign
itself; a secret key with a password is left to it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksl_patch.atomic import write_atomically
from ksl_patch.errors import PatchError
from ksl_patch.patch import Patch
from ksl_patch.patch.meta import timestamp

SUFFIX = ".minisig"
_PLAIN, _HASHED = b"Ed", b"ED"  # of a key, and of a signature over a file's hash
_MAX = 4096


def signature_path(file: Path) -> Path:
    """Where the detached signature of a file is."""
    return file.with_name(file.name + SUFFIX)


@dataclass(frozen=True)
class PublicKey:
    """number: the key's id, 8 bytes. key: 32 bytes."""

    number: bytes
    key: bytes

    def __str__(self) -> str:
        return self.number[::-1].hex().upper()

    def text(self) -> str:
        """As a file holds it."""
        return f"untrusted comment: minisign public key {self}\n{_encode(_PLAIN + self.number + self.key)}\n"

    @classmethod
    def load(cls, path: Path) -> PublicKey:
        """Read a key file, or the key alone. Raises PatchError."""
        lines = _lines(path)
        raw = _decode(lines[-1] if lines else "", path)
        if len(raw) != 42 or raw[:2] != _PLAIN:
            raise PatchError(f"{path} is not a minisign public key.")
        return cls(raw[2:10], raw[10:])


def generate(path: Path) -> PublicKey:
    """Make a key without a password: the secret at `path`, readable by its owner alone, the public one at `path`.pub.

    Raises PatchError when one of them exists.
    """
    ed25519 = _ed25519()
    public_path = path.with_name(f"{path.name}.pub")
    for each in (path, public_path):
        if each.exists():
            raise PatchError(f"{each} exists: a key is not replaced.")
    secret = ed25519.Ed25519PrivateKey.generate()
    seed, key = secret.private_bytes_raw(), secret.public_key().public_bytes_raw()
    public = PublicKey(secrets.token_bytes(8), key)
    raw = _PLAIN + b"\0\0" + b"B2" + bytes(48) + public.number + seed + key + bytes(32)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(f"untrusted comment: minisign encrypted secret key\n{_encode(raw)}\n")
        write_atomically(public_path, public.text().encode())
    except OSError as error:
        raise PatchError(f"cannot write {path}: {error.strerror or error}.") from error
    return public


def sign(file: Path, key: Path) -> Path:
    """Write `file`.minisig. Raises PatchError."""
    lines = _lines(key)
    raw = _decode(lines[-1] if lines else "", key)
    if len(raw) != 158 or raw[:2] != _PLAIN:
        raise PatchError(f"{key} is not a minisign secret key.")
    if raw[2:4] != b"\0\0":
        raise PatchError(f"{key} has a password: sign with minisign itself (`minisign -S -s {key} -m {file}`).")
    number, seed = raw[54:62], raw[62:94]
    private = _ed25519().Ed25519PrivateKey.from_private_bytes(seed)
    signature = private.sign(hashlib.blake2b(_read(file)).digest())
    trusted = f"timestamp:{timestamp()}\tfile:{file.name}\thashed"
    text = (
        f"untrusted comment: signature of a patch\n{_encode(_HASHED + number + signature)}\n"
        f"trusted comment: {trusted}\n{_encode(private.sign(signature + trusted.encode()))}\n"
    )
    path = signature_path(file)
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise PatchError(f"cannot write {path}: {error.strerror or error}.") from error
    return path


def load_signed(file: Path, key: PublicKey) -> Patch:
    """A patch whose file is signed with a key; what is checked is what is read, once. Raises PatchError."""
    content = _read(file)
    _verify(file, content, key)
    try:
        return Patch.from_bytes(content)
    except PatchError as error:
        raise PatchError(f"{file}: {error}") from error


def verify(file: Path, key: PublicKey) -> str:
    """Check `file`.minisig, and return its trusted comment. Raises PatchError for what is not signed with the key."""
    return _verify(file, _read(file), key)


def _verify(file: Path, content: bytes, key: PublicKey) -> str:
    ed25519 = _ed25519()
    from cryptography.exceptions import InvalidSignature

    path = signature_path(file)
    if not path.is_file():
        raise PatchError(f"{file} is not signed: there is no {path.name} beside it.")
    lines = _lines(path)
    if len(lines) != 4 or not lines[2].startswith("trusted comment: "):
        raise PatchError(f"{path} is not a minisign signature.")
    raw, over_all = _decode(lines[1], path), _decode(lines[3], path)
    if len(raw) != 74 or raw[:2] != _HASHED or len(over_all) != 64:
        raise PatchError(f"{path} is not a minisign signature over a hash.")
    if raw[2:10] != key.number:
        raise PatchError(f"{file} is signed with another key, {raw[2:10][::-1].hex().upper()}, than {key}.")
    trusted = lines[2].removeprefix("trusted comment: ")
    public = ed25519.Ed25519PublicKey.from_public_bytes(key.key)
    try:
        public.verify(raw[10:], hashlib.blake2b(content).digest())
        public.verify(over_all, raw[10:] + trusted.encode())
    except InvalidSignature as error:
        raise PatchError(f"the signature of {file} is not valid: the file, or {path.name}, was changed.") from error
    return trusted


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise PatchError("signatures need cryptography: pip install 'ksl-patch[sign]'.") from error
    return ed25519


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise PatchError(f"cannot read {file}: {error.strerror or error}.") from error


def _lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            return file.read(_MAX).decode("utf-8-sig").rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise PatchError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}.") from error


def _encode(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _decode(text: str, path: Path) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise PatchError(f"{path} is not in minisign's format.") from error
