"""Lower bounds of a step's time: arithmetic, memory and links, each as if alone."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from efficient_lm.planning.collectives import Collective
from efficient_lm.planning.topologies import Topology


def link_seconds(collective: Collective, devices: Sequence, topology: Topology) -> float | None:
    """Least seconds of one run of a collective among `devices`, which are in the order of the mesh.

    None where the links are not known.

    A chip has two links along each axis of the torus. With b bytes (of `Collective`), p chips in a
    group, k axes and w bytes/s a link one way: gathering or reduce-scattering takes
    b (p - 1) / p / (2 k w), half that rate along an axis that is no ring; all-reduce twice as long
    (jax-ml.github.io/scaling-book, "Sharded Matrices"); all-to-all b e / 8 / w with e chips on the
    longest axis (e / 4 hops on average, over two links a chip), twice that on a line; permuting
    b / w. Groups that lie between each other on the same links share them, as do the
    devices of a chip. Where a group spans slices, its bytes also cross the data-center network.
    """
    chip = topology.chip
    size, kind = collective.bytes, collective.kind
    group = [devices[i] for i in collective.group]
    slices = len({getattr(device, "slice_index", None) for device in group})
    inside = len(group) // slices
    exchange = "all-to-all" in kind or kind == "collective-permute"
    twice = 2 if kind == "all-reduce" else 1
    seconds = 0.0
    if slices > 1:
        # Within a slice each device first reduces, or in the end gathers, what the others bring.
        crossing = size if exchange else size / inside
        seconds = twice * crossing * (slices - 1) / slices / chip.network
    if chip.link_bandwidth is None:
        return None
    share = size if exchange else twice * size * (inside - 1) / inside
    if not chip.torus:
        return seconds + share / chip.link_bandwidth
    return seconds + share * _seconds_per_byte(kind, group[:inside], topology)


def _seconds_per_byte(kind: str, devices: Sequence, topology: Topology) -> float:
    """Seconds a byte of `share` takes over the torus links of one slice."""
    chip = topology.chip
    places = np.array([device.coords for device in devices])
    sharing = chip.devices / len({device.core_on_chip for device in devices})
    rates, slowest = 0.0, 0.0
    for axis, length in enumerate(topology.shape):
        used = sorted(set(places[:, axis].tolist()))
        if len(used) == 1:
            continue
        stride = min(b - a for a, b in itertools.pairwise(used))
        # Others use the same links where this group leaves out chips of the line.
        crowd = stride if len(used) * stride <= length else 1
        ring = len(used) * stride == length and length % chip.ring == 0
        one_way = chip.link_bandwidth / sharing / crowd
        rates += (2 if ring else 1) * one_way
        slowest = max(
            slowest, len(used) * crowd / (8 if ring else 4) / chip.link_bandwidth * sharing
        )
    if not rates:
        return 0.0  # both halves of one chip
    if kind in ("all-to-all", "ragged-all-to-all"):
        return slowest
    if kind == "collective-permute":
        return sharing / chip.link_bandwidth
    return 1.0 / rates


def bounds(
    topology: Topology, flops: float, memory_bytes: float, link: float | int | None
) -> dict[str, float | None]:
    """Seconds by resource, and a step's: at least the largest, at most about their sum.

    flops, memory_bytes: of one device in one step. link: seconds of all collectives.
    """
    chip = topology.chip
    seconds: dict[str, float | None] = {
        "compute": flops / chip.flops,
        "memory": None if chip.memory_bandwidth is None else memory_bytes / chip.memory_bandwidth,
        "interconnect": link,
    }
    known = [s for s in seconds.values() if s is not None]
    return seconds | {"overlapped": max(known), "serial": math.fsum(known)}


def by_axis(
    collectives: Sequence[Collective], devices: Sequence, topology: Topology
) -> list[Mapping[str, object]]:
    """Rows by kind and mesh axes: bytes a device and step, number, seconds."""
    rows: dict[tuple, dict] = {}
    for one in collectives:
        axes = " x ".join(one.axes) or "one chip"
        key = (one.kind, axes if one.whole else f"{axes} (in parts)")
        row = rows.setdefault(
            key, {"kind": key[0], "axes": key[1], "count": 0, "bytes": 0.0, "seconds": 0.0}
        )
        row["count"] += one.times
        row["bytes"] += one.bytes * one.times
        seconds = link_seconds(one, devices, topology)
        known = row["seconds"] is not None and seconds is not None
        row["seconds"] = row["seconds"] + seconds * one.times if known else None
    return sorted(rows.values(), key=lambda row: -row["bytes"])
