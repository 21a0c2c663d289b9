"""Which rows a process loads under any mesh, and that they land where the mesh has them."""

import jax
import numpy as np
import pytest

from efficient_lm.config import ParallelConfig
from efficient_lm.errors import ConfigError
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.parallel.placement import data_shard, place_batch, place_whole, row_shards


@pytest.mark.parametrize(
    "owners, shards",
    [
        ([[0, 0], [0, 0]], [{0, 1}]),  # one process
        ([[0], [0], [1], [1]], [{0, 1}, {2, 3}]),  # rows of their own
        ([[0, 1], [2, 3]], [{0}, {1}]),  # a sequence axis over two processes
        ([[0, 1, 2, 3]], [{0}]),  # and over all
        ([[0], [1], [0], [1]], [{0, 2}, {1, 3}]),  # devices of a torus
        ([[0, 1], [1, 0], [2, 2], [3, 2]], [{0, 1}, {2, 3}]),  # linked by a shared group
        ([[0], [0], [1]], [{0, 1, 2}]),  # unequal: everyone loads everything
    ],
)
def test_rows_of_a_process(owners, shards):
    assert row_shards(np.array(owners)) == tuple(frozenset(shard) for shard in shards)


class Device:
    """A device of another process."""

    platform = "cpu"

    def __init__(self, index: int):
        self.id, self.process_index = index, index // 2


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ({"data": 8}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"data": 2, "fsdp": 4}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"data": 2, "sequence": 4}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ({"fsdp": 4, "tensor": 2}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"data": 1, "ring": 4, "sequence": 2}, [(0, 1)] * 4),
    ],
)
def test_shards_of_four_processes_with_two_devices(sizes, expected):
    mesh = make_mesh(ParallelConfig(**sizes), [Device(index) for index in range(8)])
    assert [data_shard(mesh, process) for process in range(4)] == expected


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "ring": 2, "sequence": 2}])
def test_a_batch_is_whole_again(sizes):
    batch = {"tokens": np.arange(16 * 8, dtype=np.int32).reshape(16, 8)}
    mesh = make_mesh(ParallelConfig(**sizes), jax.devices())
    placed = place_batch(batch, mesh)["tokens"]
    np.testing.assert_array_equal(placed, batch["tokens"])
    assert len({str(shard.index) for shard in placed.addressable_shards}) == 8
    np.testing.assert_array_equal(place_whole(batch, mesh)["tokens"], batch["tokens"])


def test_a_batch_that_does_not_divide_is_refused():
    mesh = make_mesh(ParallelConfig(data=8), jax.devices())
    with pytest.raises(ConfigError, match=r"tokens of shape \(9, 8\) cannot be split"):
        place_batch({"tokens": np.zeros((9, 8), np.int32)}, mesh)
