"""The base model: where its table is, what it is, and whether a patch belongs to it; no patch is known here."""

from ksl_patch.base.digest import fingerprint
from ksl_patch.base.identity import BaseIdentity, check_base, identify
from ksl_patch.base.table import EmbeddingTable, find_embedding

__all__ = ["BaseIdentity", "EmbeddingTable", "check_base", "find_embedding", "fingerprint", "identify"]
