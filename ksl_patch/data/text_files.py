"""Text files of pairs: which endings are known, unpacking (.gz, .bz2, .xz, .zst), encodings."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

from ksl_patch.errors import DataError

_FORMATS = (".jsonl", ".json", ".tsv", ".txt", ".csv", ".parquet")
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def _unpack_zst(content: bytes) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise DataError("to unpack .zst, pip install 'ksl-patch[datasets]'.") from error
    parts = []
    while content:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(content))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        if not frame.eof:
            raise EOFError("it ends early")
        content = frame.unused_data
    return b"".join(parts)


_UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _unpack_zst,
}


def form_of(path: Path) -> str | None:
    """The suffix that says a file's format, below that of a compression."""
    suffix = unpacked(path).suffix
    return suffix.lower() if suffix.lower() in _FORMATS else None


def is_packed(path: Path) -> bool:
    """Whether a file's name says that it is compressed."""
    return path.suffix.lower() in _UNPACK


def unpacked(path: Path) -> Path:
    """A file's name without what says a compression."""
    return path.with_suffix("") if is_packed(path) else path


def is_lines(path: Path) -> bool:
    """Whether a file can be one of two with a sentence a line each: text of no other form."""
    if not path.is_file() or form_of(path) not in (None, ".txt"):
        return False
    try:
        return form_of(path) is None or "\t" not in text_of(path).partition("\n")[0]
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def text_of(path: Path) -> str:
    """A file's text, unpacked where its name says that it is packed."""
    content = path.read_bytes()
    if unpack := _UNPACK.get(path.suffix.lower()):
        try:
            content = unpack(content)
        except ValueError as error:  # bz2's
            raise EOFError(str(error)) from error
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: cannot be read as UTF-8 text: save it as UTF-8 (of Excel's forms, CSV UTF-8), or "
            f"convert it, as in `iconv -f cp1252 -t utf-8 {path.name}`."
        ) from error


def lines_of(path: Path) -> list[str]:
    """A text's lines. Only a line feed ends one, so that files of as many lines stay aligned."""
    return [line.removesuffix("\r") for line in text_of(path).split("\n")]
