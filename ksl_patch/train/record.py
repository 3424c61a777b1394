"""What a run folder says of a patch that was built in it: the settings, and where the test of its rows is."""

from __future__ import annotations

import json
import os
import re
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from ksl_patch.atomic import write_atomically
from ksl_patch.data.encoding import Encoded
from ksl_patch.data.sketch import pair_hash
from ksl_patch.errors import RunError

_STAGE = re.compile(r"[a-z]+-[0-9a-f]+")


@dataclass(frozen=True)
class Machine:
    """What a stage was computed with, and what changes its result by rounding alone.

    batch: pairs of one process at a time, such batches in a step, and processes.
    """

    device: str
    dtype: str
    autocast: bool
    batch: tuple[int, int, Annotated[int, msgspec.Meta(ge=1)]]


@dataclass(frozen=True)
class Record:
    """config: the fields of the BuildConfig. tests: the stage's folder with `ks.npz`; None without a test.

    examples: digest of what was trained on, as token ids. machine: what it was trained on; see `Material.machine`.
    """

    config: dict[str, Any]
    tests: str | None
    examples: str = ""
    machine: Machine | None = None


_SPLIT = ("data_seed", "dev", "held_out", "group")


def recorded(config: dict[str, Any]) -> dict[str, Any]:
    """A BuildConfig's fields as a record has them: JSON, with paths that hold from anywhere."""
    found = dict(config)
    for key in ("base", "pairs", "beside"):
        value = found[key]
        found[key] = _from_anywhere(value) if isinstance(value, str) else tuple(map(_from_anywhere, value))
    return dict(json.loads(json.dumps(found)))


def _from_anywhere(path: str) -> str:
    """A path from anywhere; what does not exist is an id on the Hub."""
    return os.path.abspath(path) if Path(path).exists() else path  # noqa: PTH100 - a link's name says a form, too


def write_record(run: Path, digest: str, record: Record) -> None:
    """Keep it. Raises RunError, also where the folder has the same patch of another split of the pairs."""
    before = None
    with suppress(RunError):  # none, or none that can be read
        before = read_record(run, digest).config
    if before is not None and (other := [name for name in _SPLIT if before.get(name) != record.config[name]]):
        raise RunError(
            f"{run} has this very patch with another {other[0].replace('_', '-')} ({before.get(other[0])}): pairs "
            "that choices were made on would count as held out. Give this build a folder of its own with --resume."
        )
    keep(_file(run, digest), json.dumps(asdict(record), indent=1).encode())


def keep(file: Path, content: bytes) -> None:
    """Write a file of a run folder, which is made where it is not there. Raises RunError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)
    except OSError as error:
        raise RunError(f"cannot keep the run in {file.parent}: {error.strerror or error}.") from error


def has_record(run: Path, digest: str) -> bool:
    """Whether a folder has the record of the patch with this digest."""
    return _file(run, digest).is_file()


def read_record(run: Path, digest: str) -> Record:
    """The record of the patch with this digest. Raises RunError when there is none or it cannot be read."""
    file = _file(run, digest)
    try:
        record = msgspec.json.decode(file.read_bytes(), type=Record)
        if record.tests is not None and not _STAGE.fullmatch(record.tests):
            raise ValueError(f"{record.tests!r} is not a stage's folder")
        for name in ("columns", "rows"):
            record.config[name] = tuple(record.config.get(name, ()))
    except FileNotFoundError as error:
        raise RunError(
            f"there is no record of this patch ({digest[:12]}) in {run}: name the folder that its build kept "
            "with --run, or build it again there (finished stages are reused)."
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"cannot read the record of the build in {file} ({error}).") from error
    return record


def note_use(run: Path, patch: str, pairs: Encoded) -> int:
    """Remember that a patch (by digest) was measured on pairs; how many patches were on any of them. Raises RunError.

    A use is a file of its own, so that evaluations beside each other lose none.
    """
    keys = sorted(pair_hash(pair).hex() for pair in pairs.pairs)
    keep(run / "uses" / f"{patch[:16]}-{pairs.digest[:16]}", "\n".join(keys).encode())
    patches = set()
    for file in (run / "uses").iterdir():
        if not file.name.startswith(".") and not set(keys).isdisjoint(file.read_text("ascii", "replace").split()):
            patches.add(file.name.partition("-")[0])
    return len(patches)


def read_tests(file: Path) -> dict[str, np.ndarray]:
    """What `ks.npz` of a stage holds: statistic, pvalue and counts, [V] each, and hidden_size. Raises RunError."""
    try:
        with np.load(file, allow_pickle=False) as saved:
            return {name: saved[name] for name in ("statistic", "pvalue", "counts", "hidden_size")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"cannot read {file} ({error}): delete it, and the build will make it again.") from error


def _file(run: Path, digest: str) -> Path:
    return run / f"patch-{digest[:16]}.json"
