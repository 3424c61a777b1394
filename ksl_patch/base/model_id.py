"""A base's name: its id on the Hub, or what its folder is called; not what it is, which identity.py says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ksl_patch.errors import RunError

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a model's id on the Hub: ORG/REPO."""
    return bool(_HUB_ID.fullmatch(text))


def check_base_model(base_model: str | None) -> None:
    """Raise RunError for what is not a base's id on the Hub."""
    if base_model is not None and not is_hub_id(base_model):
        raise RunError(f"{base_model[:100]!r} is not a model's id on the Hub: it has the form ORG/REPO.")


def named_in_files(folder: Path) -> str | None:
    """The id on the Hub that a model's own configuration names: where it, or what it was tuned from, came from."""
    try:
        name = json.loads((folder / "config.json").read_bytes())["_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) and is_hub_id(name) and not Path(name).exists() else None


def public_id(name_or_path: str) -> str | None:
    """A base's id on the Hub, or the last name of its folder: where somebody keeps it is nobody else's business."""
    if not name_or_path:
        return None
    path = Path(name_or_path)
    for part in path.parts:
        if part.startswith("models--") and "snapshots" in path.parts:  # the Hub's cache
            return part.removeprefix("models--").replace("--", "/", 1)
    local = path.is_absolute() or name_or_path.startswith((".", "~")) or path.exists() or len(path.parts) > 2
    return path.resolve().name if local else name_or_path
