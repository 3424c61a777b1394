"""The patch: its rows, metadata, file and digest; how it gets onto a model is elsewhere (bank, overlay, hf, vllm)."""

from ksl_patch.patch.meta import Origin, PatchMeta, Scope, Side, TemplateMeta, TicketMeta, TrainingMeta
from ksl_patch.patch.patch import Patch

__all__ = ["Origin", "Patch", "PatchMeta", "Scope", "Side", "TemplateMeta", "TicketMeta", "TrainingMeta"]
