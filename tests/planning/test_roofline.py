"""Times of collectives against hand arithmetic on tori."""

from types import SimpleNamespace

import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.planning.collectives import Collective
from efficient_lm.planning.roofline import bounds, by_axis, link_seconds
from efficient_lm.planning.topologies import CHIPS, Topology, find_topology

SIZE = 1e9


def torus(kind, shape, cores=1):
    """A topology whose devices only know where they are."""
    places = [
        SimpleNamespace(coords=[*place, 0][:3], core_on_chip=core, slice_index=None)
        for place in np.ndindex(*shape)
        for core in range(cores)
    ]
    return Topology("test", CHIPS[kind], places, shape)


def seconds(kind, group, topology):
    one = Collective(kind, SIZE, 1, ("fsdp",), True, tuple(group), "")
    return link_seconds(one, topology.devices, topology)


def test_a_whole_ring_uses_both_links_and_a_line_one():
    topology = torus("v5e", (16, 16))
    link = topology.chip.link_bandwidth
    assert link == 50e9
    ring = range(16)  # along the second axis
    assert seconds("all-gather", ring, topology) == pytest.approx(SIZE * 15 / 16 / (2 * link))
    assert seconds("all-reduce", ring, topology) == pytest.approx(SIZE * 15 / 8 / (2 * link))
    line = range(8)
    assert seconds("reduce-scatter", line, topology) == pytest.approx(SIZE * 7 / 8 / link)
    plane = range(256)
    assert seconds("all-gather", plane, topology) == pytest.approx(SIZE * 255 / 256 / (4 * link))


def test_all_to_all_and_permute():
    topology = torus("v5p", (4, 4, 4))
    link = topology.chip.link_bandwidth
    assert seconds("all-to-all", range(4), topology) == pytest.approx(SIZE * 4 / 8 / link)
    assert seconds("collective-permute", (0, 1), topology) == pytest.approx(SIZE / link)


def test_groups_between_each_other_share_links():
    topology = torus("v5e", (16, 16))
    every_second = range(0, 16, 2)
    packed = SIZE * 7 / 8 / (2 * topology.chip.link_bandwidth)
    assert seconds("all-gather", every_second, topology) == pytest.approx(2 * packed)


def test_devices_of_a_chip_share_its_links():
    topology = torus("tpu7x", (4, 4, 4), cores=2)
    link = topology.chip.link_bandwidth
    one_each, both = range(0, 8, 2), range(8)
    assert seconds("all-gather", one_each, topology) == pytest.approx(SIZE * 3 / 4 / link)
    assert seconds("all-gather", both, topology) == pytest.approx(SIZE * 7 / 8 / (2 * link))
    assert seconds("all-gather", (0, 1), topology) == 0.0


def test_slices_are_joined_by_the_network():
    topology = torus("v5e", (2, 2))
    two = [SimpleNamespace(coords=d.coords, core_on_chip=0, slice_index=i)
           for i in range(2) for d in topology.devices]  # fmt: skip
    one = Collective("all-reduce", SIZE, 1, ("dcn",), True, (0, 4), "")
    network, link = topology.chip.network, topology.chip.link_bandwidth
    assert link_seconds(one, two, topology) == pytest.approx(SIZE / network)
    both = Collective("all-reduce", SIZE, 1, ("dcn", "fsdp"), True, tuple(range(8)), "")
    assert link_seconds(both, two, topology) == pytest.approx(
        SIZE / 4 / network + 2 * SIZE * 3 / 4 / (2 * link)
    )


def test_bounds_and_rows_leave_unknown_rates_open():
    chip = CHIPS["v5e"]
    topology = Topology("test", chip, [], (2, 2))
    result = bounds(topology, chip.flops, chip.memory_bandwidth / 2, 0.25)
    assert result == {"compute": 1.0, "memory": 0.5, "interconnect": 0.25, "overlapped": 1.0,
                      "serial": 1.75}  # fmt: skip
    local = find_topology("local")
    assert bounds(local, local.chip.flops, 1.0, None)["serial"] == 1.0
    one = Collective("all-gather", SIZE, 3, ("fsdp",), True, (0, 1), "")
    (row,) = by_axis([one], local.devices, local)
    assert row == {"kind": "all-gather", "axes": "fsdp", "count": 3, "bytes": 3 * SIZE,
                   "seconds": None}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v9:2x2", "known: v5e:AxB"),
        ("v5e", "known: v5e:AxB"),
        ("v5p:8xx8", "known: v5e:AxB"),
        ("v5e:2x2x2", "2 axes"),
        ("v6e:32x32", "at most 256"),
        ("v5e:3x3", "not divisible"),
    ],
)
def test_unknown_topologies_are_one_line_that_names_the_known(name, says):
    with pytest.raises(ConfigError, match=says) as error:
        find_topology(name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_thousands_of_chips_and_several_slices():
    assert len(find_topology("v5p:16x16x16").devices) == 4096
    slices = find_topology("v5e:4x4", slices=2)
    assert {d.slice_index for d in slices.devices} == {0, 1} and len(slices.devices) == 32
