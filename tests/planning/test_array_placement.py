"""Where arrays lie: splits, bytes and holders of pieces."""

import json

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from efficient_lm.config import Config
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.planning.placement import draw, holders, placements, text
from efficient_lm.planning.topologies import find_topology

CONFIG = Config.from_dict(
    {
        "model": {"vocabulary_size": 256, "embed_dim": 64, "num_layers": 2, "max_length": 64,
                  "mixers": {"attention": {"num_heads": 4}}},
        "data": {"sequence_length": 64, "batch_size": 8},
        "parallel": {"data": 1, "fsdp": -1, "tensor": 2},
    }
)  # fmt: skip


def rows(found):
    return {(row["kind"], row["path"]): row for row in found["arrays"]}


def test_local_devices():
    found = placements(CONFIG, find_topology("local"))
    query = rows(found)["parameters", "stack/period/0/mixer/query"]
    assert query["axes"] == ["layers", "embed", "heads", "head_dim"]
    assert query["split"] == [[], ["fsdp"], ["tensor"], []]
    assert query["piece"] == [2, 16, 2, 16] and query["copies"] == 1
    assert query["bytes"] == 4 * 2 * 16 * 2 * 16
    moments = [row for (kind, _), row in rows(found).items() if kind == "optimizer"
               and row["path"].endswith("mixer/query")]  # fmt: skip
    assert [row["split"] for row in moments] == [query["split"]] * 2
    tokens = rows(found)["batch", "tokens"]
    assert tokens["split"] == [["fsdp"], []] and tokens["copies"] == 2


def test_a_topology_that_nobody_owns(tmp_path):
    found = placements(CONFIG, find_topology("v5p:2x2x2"))
    assert found["mesh"]["fsdp"] == 4 and found["mesh"]["tensor"] == 2
    shown = text(found)
    assert "heads=4/tensor" in shown and "parameters:" in shown and "optimizer:" in shown
    draw(found, tmp_path / "shardings.png")
    assert (tmp_path / "shardings.png").stat().st_size > 5000
    json.dumps(found)


def test_holders_are_where_jax_puts_the_pieces():
    mesh = make_mesh(CONFIG.parallel)
    row = {"split": [[], ["fsdp"], ["tensor"], []]}
    pieces = holders(row, mesh.shape)
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    numbers = {device: i for i, device in enumerate(mesh.devices.flat)}
    for device, index in sharding.devices_indices_map((2, 64, 4, 16)).items():
        at = (index[1].start or 0) // 16, (index[2].start or 0) // 2
        assert numbers[device] in pieces[at[0]][at[1]]
    assert np.array(pieces).shape == (4, 2, 1)
    over_tensor = holders({"split": [[], ["tensor"]]}, mesh.shape)  # each piece on four devices
    assert over_tensor == [[[0, 2, 4, 6]], [[1, 3, 5, 7]]]
