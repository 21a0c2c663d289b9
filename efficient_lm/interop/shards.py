"""Sharded safetensors files, read and written one tensor at a time."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from efficient_lm.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is; `dtype` is the name in the file, such as "BF16"."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize


def scan(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint by name, from the headers alone.

    CheckpointError if there is no safetensors file, a shard of the index is missing, or a file is
    truncated.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is no index of safetensors: {error!r}") from None
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{directory} lacks {len(missing)} of {len(names)} files of its index: "
                f"{', '.join(missing)}; download them again"
            )
    elif (directory / SINGLE_FILE).is_file():
        names = [SINGLE_FILE]
    else:
        raise CheckpointError(
            f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors are read"
        )
    tensors = {}
    for name in names:
        with _open(directory / name) as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                piece = file.get_slice(key)
                shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
                tensors[key] = TensorInfo(directory / name, shape, dtype)
    return tensors


def read(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) file by file; only one tensor is in memory unless the caller keeps it."""
    for path in sorted({info.file for info in tensors.values()}):
        for name in sorted(n for n, info in tensors.items() if info.file == path):
            # Opened for each tensor: pages of the mapped file are given back in between.
            with _open(path) as file:
                yield name, file.get_tensor(name)


def write(
    directory: Path,
    tensors: Mapping[str, TensorInfo],
    read_tensor: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Write tensors to files in the order given, with an index when there is more than one file.

    `tensors` gives shapes and dtypes (their `file` is not used); `read_tensor(name)` is asked for
    one at a time. A tensor larger than `max_shard_bytes` gets a file of its own.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.bytes
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        _write_file(directory / file, {n: tensors[n] for n in names}, read_tensor)
    if len(shards) > 1:
        total = sum(info.bytes for info in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _open(path: Path):
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file ({error}); download it again"
        ) from None


def _write_file(path: Path, tensors: Mapping[str, TensorInfo], read_tensor) -> None:
    """Header length (8 bytes), header (JSON, padded to 8 bytes), then the data.

    Wider dtypes come first, so that each tensor is aligned to its own, as readers may need.
    """
    widest_first = sorted(tensors, key=lambda name: -DTYPES[tensors[name].dtype].itemsize)
    tensors = {name: tensors[name] for name in widest_first}
    header: dict = {"__metadata__": {"format": "pt"}}  # transformers asks for the format
    offset = 0
    for name, info in tensors.items():
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.bytes],
        }
        offset += info.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in tensors:
            file.write(read_tensor(name).reshape(-1).view(np.uint8).data)
