"""Embedding patches: a handful of embedding rows with which a model answers in another of the languages it knows."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ksl_patch.bank import PatchBank
    from ksl_patch.base import BaseIdentity, check_base, find_embedding, fingerprint, identify
    from ksl_patch.errors import KslPatchError
    from ksl_patch.hf import attach
    from ksl_patch.kstest import KSResult, ks_test
    from ksl_patch.patch import Patch, PatchMeta
    from ksl_patch.ticket import Ticket, ks_ticket

__version__ = "0.1.0"

# Imported on first use, so that the command line answers before torch is loaded.
_HOME = {
    "BaseIdentity": "base",
    "check_base": "base",
    "find_embedding": "base",
    "fingerprint": "base",
    "identify": "base",
    "KslPatchError": "errors",
    "PatchBank": "bank",
    "attach": "hf",
    "KSResult": "kstest",
    "ks_test": "kstest",
    "Patch": "patch",
    "PatchMeta": "patch",
    "Ticket": "ticket",
    "ks_ticket": "ticket",
}
__all__ = [
    "BaseIdentity", "KSResult", "KslPatchError", "Patch", "PatchBank", "PatchMeta", "Ticket",
    "attach", "check_base", "find_embedding", "fingerprint", "identify", "ks_test", "ks_ticket",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ksl_patch' has no attribute {name!r}")
    return getattr(import_module(f"ksl_patch.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
