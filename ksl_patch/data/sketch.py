"""Hashes of the sentences that a patch was trained on, by which its test is kept apart without the sentences."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable

from ksl_patch.data.pairs import Pair
from ksl_patch.errors import DataError

_SKETCH, _HASH = 1024, 5  # hashes that are kept, and bytes of each


def pair_hash(pair: Pair) -> bytes:
    """5 bytes that a pair's source gives; see `Pair.key`."""
    return hashlib.sha256(pair.key.encode()).digest()[:_HASH]


def sketch(pairs: Iterable[Pair]) -> str:
    """Hashes of the pairs' sources, 5 bytes each, in base64: all of up to 1,024, else the smallest 1,024."""
    return base64.b64encode(b"".join(sorted(set(map(pair_hash, pairs)))[:_SKETCH])).decode()


def seen(kept: str, pairs: Iterable[Pair]) -> tuple[int, bool]:
    """How many pairs have a source that is in the sketch `kept`, and whether that holds all of its sources.

    Raises DataError when it is no sketch.
    """
    try:
        content = base64.b64decode(kept, validate=True)
    except ValueError as error:
        raise DataError(f"the patch's hashes of its training sentences cannot be read ({error}).") from error
    known = {content[i : i + _HASH] for i in range(0, len(content), _HASH)}
    return sum(pair_hash(pair) in known for pair in pairs), len(known) < _SKETCH
