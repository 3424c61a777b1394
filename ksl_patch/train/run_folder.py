"""A build's folder: its stages by all that they depend on, and what a continued build takes from its beginning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ksl_patch.errors import RunError
from ksl_patch.train.record import Machine, keep


class RunFolder:
    """A folder of stages. reopened: where its patch was trained, for a build that was opened again."""

    def __init__(self, path: Path, reopened: Machine | None) -> None:
        self.path, self._reopened = path, reopened

    def stage(self, kind: str, key: dict[str, Any]) -> Path:
        """The stage's folder in the run folder; `settings.json` in it says what its name was made from.

        A build that was opened again takes a stage that was finished where its patch was trained, then one of this
        kind of machine, then of any other.
        """
        own = self._named(kind, key)
        if self._reopened is None:
            return own
        there = self._named(kind, key | {"machine": asdict(self._reopened)})
        others = []
        for settings in sorted(self.path.glob(f"{kind}-*/settings.json")):
            with suppress(OSError, ValueError, TypeError):  # not a stage of ours
                if {**json.loads(settings.read_bytes()), "machine": None} == {**key, "machine": None}:
                    others.append(settings.parent)
        return next((each for each in (there, own, *others) if (each / "rows.safetensors").is_file()), own)

    def _named(self, kind: str, key: dict[str, Any]) -> Path:
        return self.path / f"{kind}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}"

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A value that a continued run takes from its beginning; made where it is not there."""
        file = self.path / name
        if not file.is_file():
            keep(file, json.dumps(make()).encode())
        try:
            return dict(json.loads(file.read_bytes()))
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {file}: {error}.") from error
