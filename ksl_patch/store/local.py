"""The local store: patch files by the digest of their content, and names for some of them.

    ROOT/patches/DIGEST.safetensors    a patch; what it does never changes
    ROOT/patches/DIGEST.safetensors.minisig    the signature of that file, where it was added with one
    ROOT/names/NAME                    the digest that a name stands for
    ROOT/lock, ROOT/in-use             held while something changes; held, shared, by who reads contents later

Every file is written beside its place and renamed into it: a crash leaves the old state or the new one.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ksl_patch.atomic import write_atomically
from ksl_patch.errors import PatchError
from ksl_patch.patch import Patch
from ksl_patch.patch.file import SUFFIX
from ksl_patch.patch.names import check_name
from ksl_patch.store.root import default_root
from ksl_patch.store.sign import signature_path

_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    """Whether a text is the digest of a patch: 64 digits of 0-9 and a-f."""
    return bool(_DIGEST.fullmatch(text))


@dataclass(frozen=True)
class Entry:
    """A content of the store and its names."""

    digest: str
    names: tuple[str, ...]
    nbytes: int


class Store:
    """A folder of patch files. Several processes may use it at once."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    def path(self, digest: str) -> Path:
        """Where the patch of a digest is, or would be. Raises PatchError for what is not a digest."""
        if not is_digest(digest):
            raise PatchError(f"{digest[:80]!r} is not a digest: it has 64 digits of 0-9 and a-f.")
        return self.root / "patches" / f"{digest}{SUFFIX}"

    def add(self, patch: Patch, name: str | None = None, *, source: Path | None = None) -> Path:
        """Put a patch into the store, unless it is there, and return its file.

        name: a name for it, which another content may have had. source: the file that it was read from; where that is
        signed, it is kept byte for byte with its signature. Raises PatchError.
        """
        path = self.path(patch.digest)
        with self._changing():
            if source is not None and signature_path(source).is_file():
                self._copy_signed(source, patch.digest)
            elif self._says_more(patch, path):
                patch.save(path)
            if name is not None:
                self._write_name(check_name(name), patch.digest)
        return path

    def _says_more(self, patch: Patch, path: Path) -> bool:
        """Whether a patch is to be the file of its content: where it has measurements that are not there."""
        if not path.is_file():
            return True
        if signature_path(path).is_file():
            return False
        try:
            there = Patch.load(path).meta
        except PatchError:
            return False  # reading it says so
        both = [(there.evaluation, patch.meta.evaluation), (there.certificate, patch.meta.certificate)]
        return any(new and not old for old, new in both) and not any(old and not new for old, new in both)

    def get(self, reference: str) -> Patch:
        """The patch of a digest or a name. Raises PatchError when it is not there, or is not what its name says."""
        digest = reference if is_digest(reference) else self.digest(reference)
        if digest is None:
            raise PatchError(f"the store has no patch named {reference[:96]!r}: `ksl-patch list` shows what it has.")
        path = self.path(digest)
        if not path.is_file():
            raise PatchError(f"the store has no patch {digest}: add it again.")
        patch = Patch.load(path)
        if patch.digest != digest:
            raise PatchError(f"{path} holds {patch.digest}: delete the file and add the patch again.")
        return patch

    def digest(self, name: str) -> str | None:
        """The digest that a name stands for, or None. Raises PatchError for a damaged name."""
        path = self.root / "names" / check_name(name)
        try:
            text = path.read_text().strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise PatchError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error
        if not is_digest(text):
            raise PatchError(f"{path} holds no digest: delete the file and add the patch again.")
        return text

    def names(self) -> dict[str, str]:
        """Every name and its digest."""
        found = sorted(entry.name for entry in _files(self.root / "names"))
        return {name: digest for name in found if (digest := self.digest(name)) is not None}

    def entries(self) -> list[Entry]:
        """Every content, those with names first."""
        by_digest: dict[str, list[str]] = {}
        for name, digest in self.names().items():
            by_digest.setdefault(digest, []).append(name)
        files = {file.stem: file for file in _files(self.root / "patches") if is_digest(file.stem)}
        entries = [Entry(d, tuple(by_digest.get(d, ())), file.stat().st_size) for d, file in files.items()]
        return sorted(entries, key=lambda entry: (not entry.names, entry.names, entry.digest))

    def remove(self, name: str) -> str:
        """Forget a name; what it stood for stays until `gc`. Returns the digest. Raises PatchError."""
        with self._changing():
            digest = self.digest(name)
            if digest is None:
                raise PatchError(f"the store has no patch named {name!r}: `ksl-patch list` shows what it has.")
            (self.root / "names" / name).unlink(missing_ok=True)
        return digest

    def gc(self, *, dry_run: bool = False) -> list[Entry]:
        """Delete the contents that have no name, and what a crash left over; returns the contents.

        Raises PatchError while a server reads from the store.
        """
        with self._changing(), self._alone(dry_run):
            unnamed = [entry for entry in self.entries() if not entry.names]
            if not dry_run:
                for entry in unnamed:
                    signature_path(self.path(entry.digest)).unlink(missing_ok=True)
                    self.path(entry.digest).unlink(missing_ok=True)
                for folder in ("patches", "names"):
                    for file in _files(self.root / folder, hidden=True):
                        file.unlink(missing_ok=True)
        return unnamed

    def hold(self) -> None:
        """Keep every content from `gc` for as long as this process lives."""
        if self.root not in _held:
            self._make(self.root)
            handle = _open(self.root / "in-use")
            self._lock(handle, fcntl.LOCK_SH)
            _held[self.root] = handle

    @contextmanager
    def _alone(self, dry_run: bool) -> Iterator[None]:
        handle = _open(self.root / "in-use")
        try:
            if not dry_run:
                self._lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise PatchError(f"a server reads patches from {self.root}: stop it first.") from error
        finally:
            os.close(handle)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        for folder in (self.root / "patches", self.root / "names"):
            self._make(folder)
        handle = _open(self.root / "lock")
        try:
            self._lock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _lock(self, handle: int, how: int) -> None:
        try:
            fcntl.flock(handle, how)
        except BlockingIOError:
            raise
        except OSError as error:  # some network storage has none
            raise PatchError(
                f"files in {self.root} cannot be locked ({error.strerror or error}): set KSL_PATCH_HOME to a folder on "
                "storage with locks."
            ) from error

    def _copy_signed(self, source: Path, digest: str) -> None:
        path = self.path(digest)
        try:
            content, signature = source.read_bytes(), signature_path(source).read_bytes()
        except OSError as error:
            raise PatchError(f"cannot read {error.filename or source}: {error.strerror or error}.") from error
        if Patch.from_bytes(content).digest != digest:
            raise PatchError(f"{source} has changed while it was read: add it again.")
        self._write(path, content)
        self._write(signature_path(path), signature)

    def _write_name(self, name: str, digest: str) -> None:
        self._write(self.root / "names" / name, f"{digest}\n".encode())

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        try:
            write_atomically(path, content)
        except OSError as error:
            raise PatchError(f"cannot write {path}: {error.strerror or error}.") from error

    @staticmethod
    def _make(folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PatchError(f"cannot make {folder}: {error.strerror or error}.") from error


_held: dict[Path, int] = {}


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise PatchError(f"cannot open {path}: {error.strerror or error}.") from error


def _files(folder: Path, *, hidden: bool = False) -> list[Path]:
    """The files of a folder; hidden ones are those that a write has not finished."""
    if not folder.is_dir():
        return []
    return [file for file in folder.iterdir() if file.name.startswith(".") == hidden and file.is_file()]
