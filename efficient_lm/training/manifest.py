"""The manifest of a checkpoint: what was saved, with a checksum of every file, written last."""

import importlib.metadata
import json
import os
import platform
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from efficient_lm.errors import CheckpointError

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
ARRAYS = "arrays"  # the directory of the orbax checkpoint, one sub-directory per part of the state

_FIELDS = ("step", "parts", "files", "config", "iterators", "metrics", "versions")
_CHUNK = 2**22  # bytes read at once for a checksum
_MOST_LINES = 10


class Damaged(Exception):
    """A checkpoint directory is incomplete or its bytes are not those that were saved."""


def write(directory: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a finished orbax checkpoint in `directory`, flushed to the disk.

    `content` holds step, parts ({part: {array path: [shape, dtype]}}), config, iterators and
    metrics; library versions and the size and CRC-32 of every file are added.
    """
    names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda name: _crc32(directory / name), names)
        files = {
            name: [(directory / name).stat().st_size, crc]
            for name, crc in zip(names, sums, strict=True)
        }
    text = json.dumps({**content, "versions": versions(), "files": files}, default=_to_json)
    whole = {"format_version": FORMAT_VERSION, "crc32": zlib.crc32(text.encode()), "content": text}
    with open(directory / FILE_NAME, "w") as file:
        json.dump(whole, file)
        file.flush()
        os.fsync(file.fileno())


def read(directory: Path) -> dict[str, Any]:
    """The content of a manifest.

    Raises Damaged when it is missing or not as written, and CheckpointError when a newer version
    of the format wrote it.
    """
    path = directory / FILE_NAME
    try:
        whole = json.loads(path.read_bytes())
        version, text = whole["format_version"], whole["content"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {directory} has format version {version}; this efficient_lm reads "
                f"versions up to {FORMAT_VERSION}: install a newer efficient_lm"
            )
        if zlib.crc32(text.encode()) != whole["crc32"]:
            raise Damaged(f"{FILE_NAME} is damaged (wrong checksum)")
        content = json.loads(text)
        missing = [name for name in _FIELDS if name not in content]
    except FileNotFoundError:
        raise Damaged(f"{FILE_NAME} is missing") from None
    except OSError as error:
        raise Damaged(f"{FILE_NAME} is unreadable ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Damaged(f"{FILE_NAME} is damaged (not a manifest)") from None
    if missing:
        raise Damaged(f"{FILE_NAME} lacks {', '.join(missing)}")
    return content


def verify(directory: Path, content: Mapping[str, Any], parts: Iterable[str]) -> None:
    """Raise Damaged unless the files of `parts` have the sizes and checksums of the manifest."""
    others = tuple(f"{ARRAYS}/{part}/" for part in content["parts"] if part not in set(parts))
    names = [name for name in content["files"] if not name.startswith(others)]

    def reason(name: str) -> str | None:
        size, crc = content["files"][name]
        path = directory / name
        try:
            actual = path.stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes instead of {size}"
            return None if _crc32(path) == crc else f"{name} has a wrong checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} is unreadable ({error.strerror})"

    with ThreadPoolExecutor() as pool:
        reasons = [r for r in pool.map(reason, names) if r]
    if reasons:
        raise Damaged(reasons[0] + (f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""))


def differences(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], *, cast: bool = False
) -> list[str]:
    """Lines that say how two tables {array path: [shape, dtype]} differ; empty when they fit.

    With `cast`, one floating dtype fits another.
    """
    lines = []
    for path in sorted(saved.keys() | wanted.keys()):
        if path not in wanted:
            lines.append(f"{path}: unexpected, {_describe(saved[path])} in the checkpoint")
        elif path not in saved:
            lines.append(f"{path}: missing in the checkpoint, wanted {_describe(wanted[path])}")
        else:
            (shape, dtype), (wanted_shape, wanted_dtype) = saved[path], wanted[path]
            both_float = cast and "float" in dtype and "float" in wanted_dtype
            if list(shape) != list(wanted_shape) or (dtype != wanted_dtype and not both_float):
                lines.append(
                    f"{path}: {_describe(saved[path])} in the checkpoint, "
                    f"wanted {_describe(wanted[path])}"
                )
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"and {len(lines) - _MOST_LINES} more"]
    return lines


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a run computes and stores."""
    packages = ("efficient_lm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            found[name] = "not installed"
    return found


def _describe(entry) -> str:
    shape, dtype = entry
    return f"{dtype}[{','.join(map(str, shape))}]"


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _to_json(value):
    """NumPy and JAX scalars and arrays as plain numbers and lists."""
    return np.asarray(value).tolist()
