"""Which rows of a batch a process loads, and how they become arrays over all devices."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from efficient_lm.errors import ConfigError
from efficient_lm.parallel.rules import ROWS, batch_sharding


def data_shard(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(index, count): which of how many parts of each global batch a process loads.

    Processes whose devices hold the same rows, such as those along a sequence axis, have the same
    index: they load the same rows, and each takes its part of the length.

    Args:
      process: None: this one.
    """
    shards = _mesh_shards(mesh)
    mine = _groups(mesh, jax.process_index() if process is None else process)
    return next(i for i, shard in enumerate(shards) if shard >= mine), len(shards)


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays, split over the devices, from the rows of this process's `data_shard`.

    The rows of a shard go, in order, to those places of the global batch that its devices hold:
    which global batch has which rows does not depend on the number of processes.

    Args:
      batch: arrays [rows of the shard, T], alike in all processes of a shard.

    Returns arrays [B, T]. ConfigError where the devices cannot share the rows or the length.
    """
    sharding = batch_sharding(mesh)
    index, count = data_shard(mesh)
    shard = sorted(_mesh_shards(mesh)[index])
    groups = math.prod(mesh.shape[axis] for axis in ROWS)

    def place(name: str, rows: np.ndarray) -> jax.Array:
        shape = (rows.shape[0] * count, *rows.shape[1:])
        try:
            sharding.shard_shape(shape)
        except ValueError:
            raise ConfigError(
                f"{name} of shape {shape} cannot be split over a mesh of {dict(mesh.shape)}; make "
                "rows and length multiples of the axes that split them"
            ) from None
        height = shape[0] // groups  # rows of one group of devices

        def part(place: tuple[slice, ...]) -> np.ndarray:
            first = place[0].start or 0
            own = shard.index(first // height) * height
            return rows[(slice(own, own + height), *place[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: place(name, rows) for name, rows in batch.items()}


def place_whole(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The same from all rows, which every process has."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(
            rows.shape, sharding, lambda place, rows=rows: rows[place]
        )
        for name, rows in batch.items()
    }


def row_shards(owners: Int[np.ndarray, "G D"]) -> tuple[frozenset[int], ...]:
    """The groups of rows that make up each data shard, in the order of their first group.

    Groups that one process holds belong together, and so do processes that share a group. Shards
    of unequal size become one shard of all groups, since each must load equally many rows.

    Args:
      owners: process of each device, by the group of rows that it holds.
    """
    held: dict[int, set[int]] = {}
    for group, processes in enumerate(owners):
        for process in processes:
            held.setdefault(int(process), set()).add(group)
    shards: list[set[int]] = []
    for groups in held.values():
        linked = [shard for shard in shards if shard & groups]
        shards = [shard for shard in shards if not shard & groups]
        shards.append(groups.union(*linked))
    if len({len(shard) for shard in shards}) > 1:
        shards = [set(range(len(owners)))]
    return tuple(frozenset(shard) for shard in sorted(shards, key=min))


@functools.lru_cache(maxsize=16)
def _mesh_shards(mesh: Mesh) -> tuple[frozenset[int], ...]:
    return row_shards(_owners(mesh))


@functools.lru_cache(maxsize=16)
def _groups(mesh: Mesh, process: int) -> frozenset[int]:
    """The groups of rows that the devices of a process hold."""
    return frozenset(np.flatnonzero((_owners(mesh) == process).any(axis=1)).tolist())


def _owners(mesh: Mesh) -> np.ndarray:
    """[groups of rows, other devices]: the process of each device."""
    first: Iterable[Any] = [mesh.axis_names.index(axis) for axis in ROWS]
    devices = np.moveaxis(mesh.devices, list(first), range(len(ROWS)))
    processes = np.array([device.process_index for device in devices.flat], np.int64)
    return processes.reshape(math.prod(mesh.shape[axis] for axis in ROWS), -1)
