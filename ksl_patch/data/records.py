"""Records of JSON, of Parquet, and of Hugging Face datasets, each with its place in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from ksl_patch.data.text_files import lines_of
from ksl_patch.errors import DataError


class Wrong(str):
    """Why a place holds no record."""


# A place in words, and what is there: values by column, if it is a pair.
Record = tuple[str, Any]


def read_json(path: Path) -> Iterator[Record]:
    """The records of an array, or of an object a line. Raises DataError for a file that is neither."""
    lines = lines_of(path)
    text, first = "\n".join(lines).strip(), next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not valid JSON ({error}).") from error
        yield from ((f"{path}, item {number}", record) for number, record in enumerate(records, start=1))
        return
    if first.strip() == "{" or path.suffix.lower() == ".json":
        whole = None
        with suppress(ValueError, RecursionError):
            whole = json.loads(text)
        if isinstance(whole, dict) and "\n" in text:
            names = ", ".join(map(str, whole))
            raise DataError(f"{path}: one object ({names}): expected an array, or an object a line.")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"{path}, line {number}", Wrong(f"not valid JSON ({error}).")


def read_parquet(path: Path) -> Iterator[Record]:
    """The rows of a Parquet file. Raises DataError."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: to read Parquet, pip install 'ksl-patch[datasets]'.") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except Exception as error:  # the library raises many kinds, its own and Python's
        raise DataError(f"{path}: not a Parquet file that can be read, after row {number} ({error}).") from error


def read_dataset(where: str, limit: int | None) -> Iterator[Record]:
    """The rows of a Hugging Face dataset, `id[@revision][:config[:split]]`; see `read_pairs`. Raises DataError."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{where}: no such file; to read it as a Hugging Face dataset, pip install 'ksl-patch[datasets]'."
        ) from error

    name, config, split = islice([*where.split(":", 2), None, None], 3)
    assert name is not None
    revision = None
    if not Path(name).exists():
        name, _, revision = name.partition("@")
    streamed = limit is not None and "[" not in (split or "")
    try:
        data = datasets.load_dataset(
            name, config or None, split=split or "train", revision=revision or None, streaming=streamed
        )
        records = list(islice(data, limit))
    except Exception as error:  # the library raises many kinds, its own and others'
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{where}: neither a file nor a dataset that can be loaded ({reason}).") from error
    yield from ((f"{where}, row {number}", record) for number, record in enumerate(records, start=1))
