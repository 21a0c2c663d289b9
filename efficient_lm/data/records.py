"""Documents that are rows of JSON lines or Parquet files."""

import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from efficient_lm.errors import DataError


def read_jsonl(path: Path, field: str, wanted: Callable[[int], bool]) -> Iterator[str]:
    """String `field` of each line whose number (from 1) is `wanted`; `.gz` files are unpacked.

    Raises:
      DataError: naming file and line, for a line that is not UTF-8, not a JSON object or without
        the field; naming the file, where it cannot be read.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if wanted(number) and not line.isspace():
                    yield _field_of_line(line, field, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def read_parquet(path: Path, field: str, wanted: Callable[[int], bool]) -> Iterator[str]:
    """String column `field` of each row whose number (from 1) is `wanted`."""
    parquet = import_extra("pyarrow.parquet")
    pyarrow = import_extra("pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise DataError(
                    f"{path} has no column {field!r} (config.data.text_field); "
                    f"columns: {', '.join(columns)}"
                )
            number = 0
            for group in file.iter_batches(columns=[field]):
                for value in group.column(0):
                    number += 1
                    if wanted(number):
                        text = value.as_py()
                        if not isinstance(text, str):
                            raise DataError(f"{path} row {number}: {field!r} is not a string")
                        yield text
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def import_extra(name: str) -> ModuleType:
    """A module of the `data` extra; DataError that says how to install it where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"{error}; install it with: pip install 'efficient_lm[data]'") from error


def _field_of_line(line: bytes, field: str, place: str) -> str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        known = f"; its fields: {', '.join(row)}" if isinstance(row, dict) else ""
        raise DataError(f"{place} has no text field {field!r} (config.data.text_field){known}")
    return row[field]


READERS = {"jsonl": read_jsonl, "parquet": read_parquet}
SUFFIXES = {"jsonl": (".jsonl", ".jsonl.gz"), "parquet": (".parquet",)}
