"""Documents of a split from files: Python's standard library, text, JSON lines, Parquet."""

import glob
import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from efficient_lm.config import DataConfig
from efficient_lm.data import records
from efficient_lm.errors import DataError

SPLITS = ("train", "valid")
# Left out of the standard library: packaged apart by some distributions (so not on every machine),
# or tables rather than programs.
STDLIB_EXCLUDED = frozenset(
    ("test", "idlelib", "lib2to3", "distutils", "tkinter", "turtledemo", "turtle", "ensurepip",
     "venv", "encodings", "pydoc_data")
)  # fmt: skip


def read_documents(config: DataConfig, split: str) -> Iterator[str]:
    """Documents of `split` ("train" or "valid") of a source of text, in a fixed order.

    Files are split by a hash of their relative path, so that a file is in the same split on every
    machine, and rows of JSON lines and Parquet by a hash of path and number; a single text file is
    cut at int(characters * (1 - valid_fraction)) instead. `config.valid_paths` overrides all that.

    Raises:
      DataError: a path is missing or unreadable, or text is not UTF-8.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; allowed: 'train', 'valid'")
    if config.source == "python_stdlib":
        files = split_by_hash(stdlib_files(), split, config.valid_fraction)
        yield from map(read_text, files.values())
        return
    if config.source != "text" and config.source not in records.READERS:
        raise DataError(
            f"config.data.source={config.source!r} has no text of files to read; allowed here: "
            f"python_stdlib, text, {', '.join(records.READERS)}"
        )
    suffixes = records.SUFFIXES.get(config.source, ("",))
    paths = config.valid_paths if config.valid_paths and split == "valid" else config.paths
    files = find_files(paths, suffixes)
    if config.source in records.READERS:
        for name, path in files.items():
            wanted = _wanted_rows(name, config, split)
            yield from records.READERS[config.source](path, config.text_field, wanted)
    elif config.valid_paths:
        yield from map(read_text, files.values())
    elif len(files) == 1:
        (path,) = files.values()
        yield cut_text(read_text(path), split, config.valid_fraction, path)
    else:
        yield from map(read_text, split_by_hash(files, split, config.valid_fraction).values())


def stdlib_files() -> dict[str, Path]:
    """Source files of the running Python's standard library, by relative path, sorted.

    Only modules that `sys.stdlib_module_names` lists and that every distribution ships: without
    tests, IDLE, Tk, and code tables (STDLIB_EXCLUDED). About 700 files and 10 MB.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = {}
    for name in sorted(sys.stdlib_module_names - STDLIB_EXCLUDED):
        if (root / f"{name}.py").is_file():
            files[f"{name}.py"] = root / f"{name}.py"
        for path in (root / name).rglob("*.py"):
            parts = path.relative_to(root).parts
            if not {"test", "tests", "site-packages", "__pycache__"}.intersection(parts):
                files["/".join(parts)] = path
    if not files:
        raise DataError(
            f"no Python source files under {root}; this Python ships its library compiled: "
            "give config.data.source='text' and config.data.paths"
        )
    return dict(sorted(files.items()))


def find_files(paths: Sequence[str], suffixes: Sequence[str] = ("",)) -> dict[str, Path]:
    """Files of `paths` (files, folders, globs), by relative path, sorted.

    Folders and globs yield files with one of `suffixes`, hidden files excepted; their relative
    path starts at the folder, or at the first folder of the glob without a wildcard.
    """
    if not paths:
        raise DataError("config.data.paths is empty; give files, folders or globs")
    files: dict[str, Path] = {}
    for given in paths:
        pattern = os.path.expanduser(str(given))
        if os.path.isfile(pattern):
            found, root = [pattern], os.path.dirname(pattern)
        elif os.path.isdir(pattern):
            found, root = (
                glob.glob(os.path.join(glob.escape(pattern), "**"), recursive=True),
                pattern,
            )
        elif glob.has_magic(pattern):
            found = glob.glob(pattern, recursive=True)
            root = os.path.dirname(pattern[: min(pattern.find(c) % len(pattern) for c in "*?[")])
        else:
            raise DataError(f"{given} does not exist (config.data.paths)")
        found = [f for f in found if os.path.isfile(f)]
        if pattern not in found:
            found = [f for f in found if f.endswith(tuple(suffixes))]
        if not found:
            raise DataError(f"{given} holds no file{_or_suffixes(suffixes)} (config.data.paths)")
        for file in found:
            name = os.path.relpath(file, root or ".").replace(os.sep, "/")
            while name in files and files[name] != Path(file):  # two folders with equal names
                name = "+" + name
            files[name] = Path(file)
    return dict(sorted(files.items()))


def read_text(path: Path) -> str:
    """The whole file as text; DataError if unreadable, empty or not UTF-8."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert the file to UTF-8"
        ) from error
    return text


def hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    digest = hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_hash(files: dict[str, Path], split: str, fraction: float) -> dict[str, Path]:
    """The files of `split`: validation takes those whose hashed name is below `fraction`.

    Both splits get at least one file, the one with the lowest or the highest hash.
    """
    if len(files) < 2:
        raise DataError(f"cannot split {len(files)} file(s) by file; give config.data.valid_paths")
    ranked = sorted(files, key=hash_fraction)
    count = sum(hash_fraction(name) < fraction for name in ranked)
    count = min(max(count, 1), len(ranked) - 1)
    chosen = set(ranked[:count] if split == "valid" else ranked[count:])
    return {name: path for name, path in files.items() if name in chosen}


def _wanted_rows(name: str, config: DataConfig, split: str) -> Callable[[int], bool]:
    """Whether row `number` of file `name` belongs to `split`."""
    if config.valid_paths:
        return lambda number: True
    return lambda number: (
        (hash_fraction(f"{name}:{number}") < config.valid_fraction) == (split == "valid")
    )


def cut_text(text: str, split: str, fraction: float, path: Path) -> str:
    """The first 1 - `fraction` of the characters for "train", the others for "valid"."""
    cut = int(len(text) * (1 - fraction))
    part = text[:cut] if split == "train" else text[cut:]
    if not part:
        raise DataError(
            f"{path} has {len(text)} characters: nothing is left for the {split} split at "
            f"config.data.valid_fraction={fraction}"
        )
    return part


def _or_suffixes(suffixes: Sequence[str]) -> str:
    named = [s for s in suffixes if s]
    return f" ending in {' or '.join(named)}" if named else ""
