"""The base model: its table and head, what identifies it, and the check that a model is it; no Patch is here."""

from ksl_patch.base.identity import BaseIdentity, check_base, identify
from ksl_patch.base.model_digests import fingerprint
from ksl_patch.base.table import EmbeddingTable, find_embedding

__all__ = ["BaseIdentity", "EmbeddingTable", "check_base", "find_embedding", "fingerprint", "identify"]
