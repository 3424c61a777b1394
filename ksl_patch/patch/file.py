"""The one-file form of a patch (docs/format.md): safetensors with a JSON object in the metadata key `ksl_patch`.

The object is {"format_version", "checksum", "meta"}. Whether what it holds fits together, checks.py says.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, NamedTuple

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError

from ksl_patch.errors import PatchError
from ksl_patch.patch.meta import PatchMeta

SUFFIX = ".safetensors"
FORMAT_VERSION = 1
_MAX_HEADER = 16 * 2**20  # parsed JSON takes many times its text in memory
# Fields that came later: a file without them has the bytes, and the checksum, that it always had.
_LATER = {
    "base": ("body",),
    "template": ("fields", "end_token_id", "before_answer", "unpatched"),
    "training": ("pairs_read", "embed_pairs_read", "processes", "hyperparameters", "sources"),
}


class _FileMeta(msgspec.Struct, forbid_unknown_fields=True):
    format_version: int
    checksum: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    meta: PatchMeta


class _FormatOnly(msgspec.Struct):
    format_version: int


class Content(NamedTuple):
    """What a file holds: the metadata, the tensors by name, and the checksum that it should have."""

    meta: PatchMeta
    tensors: dict[str, torch.Tensor]
    checksum: str


def encode(meta: PatchMeta, tensors: dict[str, torch.Tensor], digest: str) -> bytes:
    """A file's bytes, the same for the same patch. digest: the patch's."""
    content = {"format_version": FORMAT_VERSION, "checksum": checksum(meta, digest), "meta": _as_written(meta)}
    text = msgspec.json.encode(content, order="deterministic").decode()
    # safetensors refuses tensors that share memory, and writes several metadata keys in a random order.
    tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    written: bytes = safetensors.torch.save(tensors, metadata={"ksl_patch": text})
    return written


def decode(content: bytes) -> Content:
    """`encode` backwards. Raises PatchError for bytes that are no patch's."""
    file = _read_meta(content)
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise PatchError(f"not a valid safetensors file ({error}).") from error
    required = {"token_ids", "rows", "base_rows"}
    if not required <= tensors.keys() <= required | {"output_rows"}:
        raise PatchError(f"has the tensors {sorted(tensors)}, but a patch has {sorted(required)} (and output_rows).")
    return Content(file.meta, tensors, file.checksum)


def checksum(meta: PatchMeta, digest: str) -> str:
    """sha256 over the whole content, description included: finds a damaged file."""
    text = msgspec.json.encode(_as_written(meta), order="deterministic")
    return hashlib.sha256(digest.encode() + b"\n" + text).hexdigest()


def _read_meta(content: bytes) -> _FileMeta:
    # safetensors: 8 bytes of header length, then that many bytes of JSON, then the data.
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise PatchError(
            f"not a valid safetensors file (its {len(content)} bytes cannot hold the header it announces)."
        )
    if length > _MAX_HEADER:
        raise PatchError(f"not a patch: its header of {length} bytes is larger than any patch's ({_MAX_HEADER}).")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise PatchError("not a valid safetensors file (its header is not JSON).") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    text = metadata.get("ksl_patch") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise PatchError("a safetensors file, but not a patch: its metadata has no 'ksl_patch' entry.")
    try:
        version = msgspec.json.decode(text, type=_FormatOnly).format_version
        if version != FORMAT_VERSION:
            raise PatchError(
                f"has patch format {version}, and this ksl-patch reads format {FORMAT_VERSION}: "
                "use the ksl-patch that wrote it, or a newer one."
            )
        return msgspec.json.decode(text, type=_FileMeta)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise PatchError(f"the metadata is not valid ({error}).") from error


def _as_written(meta: PatchMeta) -> dict[str, Any]:
    """The metadata as a file holds it."""
    fields: dict[str, Any] = msgspec.to_builtins(meta)
    for name, later in _LATER.items():
        if fields[name] is not None:
            fields[name] = {key: value for key, value in fields[name].items() if key not in later or value is not None}
    return fields
