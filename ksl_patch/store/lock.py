"""What a deployment serves, written down: patches.toml, and patches.lock with the content that each reference had.

base = "HuggingFaceTB/SmolLM2-135M-Instruct"
[build]                   # options of `ksl-patch build` for all, and, below, for one
top-k = 18
[patches]
es = "es.safetensors"     # a path from this file's folder, a name or digest of the local store, or hf://ORG/REPO/FILE
[patches.sw]              # what `ksl-patch build --config` builds: sw.safetensors, where `file` names no other
pairs = "en-sw.jsonl"
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from ksl_patch.atomic import write_atomically
from ksl_patch.errors import PatchError, RunError
from ksl_patch.patch import Patch
from ksl_patch.patch.file import SUFFIX
from ksl_patch.patch.names import check_name
from ksl_patch.store.hub import PREFIX, HubReference, fetch
from ksl_patch.store.references import load

VERSION = 1
_PATHS = ("pairs", "resume")  # options that name files


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A patches.toml. patches: reference by name."""

    base: str
    patches: dict[str, str]


class Recipe(msgspec.Struct, frozen=True):
    """How a patch of a patches.toml is built. options: as `ksl-patch build` has them, by name."""

    file: Path
    options: dict[str, Any]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    base: str
    patches: dict[str, str | dict[str, Any]]
    build: dict[str, Any] = {}


class Locked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a reference stood for when it was locked. revision: the commit, of a reference to the Hub."""

    reference: str
    digest: str
    base_fingerprint: str
    revision: str | None = None


class Lock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A patches.lock."""

    version: int
    base: str
    patches: dict[str, Locked]


def read_config(path: Path) -> Config:
    """Read a patches.toml, with its paths made absolute. Raises RunError for what is not one."""
    return _resolved(_parse(path), path)


def read_recipes(path: Path) -> tuple[str, dict[str, Recipe]]:
    """The base of a patches.toml, and those of its patches that it says how to build.

    Relative paths are from the file's folder. Raises RunError for what is not one.
    """
    found, folder = _read(path), path.resolve().parent
    references, recipes = _resolved(_served(found), path).patches, {}
    for name, entry in found.patches.items():
        if isinstance(entry, dict):
            merged = {key.replace("_", "-"): value for part in (found.build, entry) for key, value in part.items()}
            options = {
                key: _path_in(value, folder, written=key == "resume") if key in _PATHS else value
                for key, value in merged.items()
                if key != "file"
            }
            if "beside" in merged:
                options["beside"] = _beside(merged["beside"], name, references, folder)
            recipes[name] = Recipe(folder / _file_of(name, entry), options)
    return found.base, recipes


def _beside(given: Any, name: str, references: dict[str, str], folder: Path) -> Any:
    """References of the patches that one is built beside, by the file's own names first; true: of those before it."""
    if isinstance(given, bool):
        given = list(references)[: list(references).index(name)] if given else []
    each = given if isinstance(given, list) else [given]
    return [
        references[other] if isinstance(other, str) and other in references else _path_in(other, folder)
        for other in each
    ]


def _path_in(value: Any, folder: Path, *, written: bool = False) -> Any:
    """A value, or each of a list, as a path in a folder: where such a file is there, or is to be written."""
    if isinstance(value, list):
        return [_path_in(each, folder) for each in value]
    if isinstance(value, str) and value and (written or os.path.exists(folder / value)):  # noqa: PTH110
        return str(folder / value)
    return value


def _file_of(name: str, entry: dict[str, Any]) -> str:
    return str(entry.get("file", f"{name}{SUFFIX}"))


def _read(path: Path) -> _File:
    try:
        with path.open("rb") as file:
            found = msgspec.convert(tomllib.load(file), _File)
        for name, entry in found.patches.items():
            check_name(name)
            own = entry.get("file", SUFFIX) if isinstance(entry, dict) else SUFFIX
            if not isinstance(own, str) or not own.endswith(SUFFIX) or own.startswith(PREFIX):
                raise PatchError(f"the `file` of {name} is to be written, so it is a path that ends in {SUFFIX}")
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError, PatchError) as error:
        raise RunError(f"{path} is not a list of patches: {str(error).rstrip('.')}.") from error
    return found


def _parse(path: Path) -> Config:
    return _served(_read(path))


def _served(found: _File) -> Config:
    """What is served of a patches.toml: of a patch that is built, its file."""
    served = {
        name: f".{os.sep}{_file_of(name, entry)}" if isinstance(entry, dict) else entry
        for name, entry in found.patches.items()
    }
    return Config(found.base, served)


def _resolved(config: Config, path: Path) -> Config:
    folder = path.resolve().parent
    return Config(config.base, {name: _absolute(reference, folder) for name, reference in config.patches.items()})


def lock_path(config: Path) -> Path:
    """Where the lock of a patches.toml is: beside it, with the ending .lock."""
    return config.with_suffix(".lock")


def write_lock(path: Path) -> Lock:
    """Look every patch of a patches.toml up and write its lock. Raises RunError, PatchError."""
    config = _parse(path)
    entries = {
        name: _lock(config.patches[name], reference)
        for name, reference in sorted(_resolved(config, path).patches.items())
    }
    _one_base(entries)
    lock = Lock(VERSION, config.base, entries)
    content = msgspec.json.format(msgspec.json.encode(lock), indent=2) + b"\n"
    try:
        write_atomically(lock_path(path), content)
    except OSError as error:
        raise RunError(f"cannot write {lock_path(path)}: {error.strerror or error}.") from error
    return lock


def check_locked(path: Path) -> Config:
    """Read a patches.toml with the Hub's revisions of its lock.

    Raises RunError unless every patch is what the lock says, and the lock is complete; PatchError for what is no patch.
    """
    config, where = read_config(path), lock_path(path)
    try:
        lock = msgspec.json.decode(where.read_bytes(), type=Lock)
    except FileNotFoundError as error:
        raise RunError(f"there is no {where}: `ksl-patch lock {path}` writes it.") from error
    except (OSError, msgspec.DecodeError) as error:
        raise RunError(f"{where} is not a lock ({error}): `ksl-patch lock {path}` writes it.") from error
    if lock.version != VERSION:
        raise RunError(f"{where} has version {lock.version}, and this ksl-patch reads {VERSION}.")
    if lock.base != config.base or lock.patches.keys() != config.patches.keys():
        raise RunError(f"{where} is not of this {path.name}, which was changed since: lock it again.")
    found_at = {}
    for name, reference in config.patches.items():
        entry = lock.patches[name]
        if reference.startswith(PREFIX):
            if entry.reference != reference:
                raise RunError(f"{where} has {name} from {entry.reference}, not {reference}: lock it again.")
            reference = str(replace(HubReference.parse(reference), revision=entry.revision))
        found_at[name] = reference
        found = load(reference).digest
        if found != entry.digest:
            raise RunError(f"{name} is {found[:12]}, and {where} has {entry.digest[:12]}: not what was locked.")
    return Config(config.base, found_at)


def _lock(given: str, reference: str) -> Locked:
    """What a reference stands for now. given: as the patches.toml has it."""
    if reference.startswith(PREFIX):
        fetched = fetch(reference)
        patch, revision = Patch.load(fetched.path), fetched.reference.revision
    else:
        patch, revision = load(reference), None
    return Locked(given, patch.digest, patch.meta.base.fingerprint, revision)


def _one_base(entries: dict[str, Locked]) -> None:
    bases = {entry.base_fingerprint for entry in entries.values()}
    if len(bases) > 1:
        raise RunError(f"the patches are for {len(bases)} different bases, and one server has one.")


def _absolute(reference: str, folder: Path) -> str:
    if reference.startswith(PREFIX):
        return reference
    is_path = os.sep in reference or reference.endswith(SUFFIX)
    return str(folder / reference) if is_path else reference
