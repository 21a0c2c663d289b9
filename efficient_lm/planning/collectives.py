"""The collectives of a compiled program, read from its HLO text."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
         "collective-permute", "collective-broadcast")  # fmt: skip
_OPERATION = re.compile(rf"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(calls|body|condition|to_apply|branch_computations|true_computation|"
                     r"false_computation|called_computations)=(\{[^}]*\}|%?[\w.-]+)")  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One collective instruction of a device's program.

    bytes: of one device's larger side, operand or result: the gathered array, the array to be
      reduced, what is exchanged. times: how often a step runs it. axes: mesh axes whose devices
      take part; `whole` is False when they do only in part. group: partitions that take part
      together, of the first group. operation: what the program calls it.
    """

    kind: str
    bytes: float
    times: int
    axes: tuple[str, ...]
    whole: bool
    group: tuple[int, ...]
    operation: str


def read_collectives(text: str, mesh_shape: Mapping[str, int]) -> tuple[list[Collective], set[str]]:
    """(collectives, notes) of an HLO module after optimization and partitioning.

    mesh_shape: sizes of the mesh axes, whose product is the number of partitions. A collective in
    a loop counts with the loop's trips, which are read from `known_trip_count` or from the bound in
    the loop's condition; notes say where neither is there. On TPUs one collective may be spread
    over several fusions to overlap with their work; its parts share a chain and count once. Those
    between slices are transfers through the host there, and along "dcn".
    """
    computations, entry = _computations(text)
    notes: set[str] = set()
    runs = _runs(computations, entry, notes)
    found: dict[tuple, Collective] = {}
    for name, lines in computations.items():
        if not runs.get(name):
            continue
        for line in lines:
            match = _OPERATION.match(line)
            if match is not None:
                one = _collective(match, name, runs[name], mesh_shape)
            else:
                one = _between_slices(line, runs[name], mesh_shape)
            if one is None:
                continue
            chain = re.search(r'chain_id="(\d+)"', line)
            part = re.match(r"\s*(?:ROOT )?%?([\w.-]+) =", line).group(1)
            key = (chain.group(1), one.kind, one.bytes) if chain else (name, part)
            if key not in found or found[key].times < one.times:
                found[key] = one
    return list(found.values()), notes


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation by name, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            current = start.group(2)
            computations[current] = []
            entry = current if start.group(1) else entry
        elif current:
            computations[current].append(line)
    return computations, entry


def _runs(computations: Mapping[str, list[str]], entry: str, notes: set[str]) -> dict[str, int]:
    """How often each computation runs in one run of the program."""
    runs = dict.fromkeys(computations, 0)

    def run(name: str, times: int) -> None:
        if name not in runs:
            return
        runs[name] += times
        for line in computations[name]:
            called = _CALLED.findall(line)
            if not called:
                continue
            trips = 1
            if " while(" in line:
                trips = _trips(line, computations)
                if trips is None:
                    notes.add("a loop without a plain bound is counted once")
                    trips = 1
            for role, names in called:
                if role == "to_apply" and " call(" not in line:
                    continue
                for each in re.findall(r"[\w.-]+", names):
                    run(each, times * trips)

    run(entry, 1)
    return runs


def _trips(line: str, computations: Mapping[str, list[str]]) -> int | None:
    """Trips of a while loop; None when neither a count nor a constant bound is in the text."""
    known = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', line)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.-]+)", line)
    lines = computations.get(condition.group(1), []) if condition else []
    bounds = [int(n) for l in lines for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", l)]
    return max(bounds) if bounds else None


def _collective(match, computation: str, times: int, mesh_shape) -> Collective | None:
    """What an instruction says of itself; None for one among single devices."""
    name, shapes, kind, start, rest = match.groups()
    sizes = [_size(dtype, dims) for dtype, dims in _SHAPE.findall(shapes)]
    # The start of an asynchronous one returns its operands too, and states of the transfer.
    if start and kind in ("all-gather", "collective-permute"):
        sizes = [max(sizes)] if len(sizes) <= 4 else sizes[len(sizes) // 2 :]
    size = float(sum(sizes))
    devices = math.prod(mesh_shape.values())
    groups = replica_groups(rest, devices)
    if groups is None:
        group, axes, whole = (
            tuple(range(devices)),
            tuple(a for a, n in mesh_shape.items() if n > 1),
            True,
        )
    else:
        group = tuple(int(i) for i in groups[0])
        axes, whole = axes_of(group, mesh_shape)
        whole |= kind == "collective-permute"  # of which the group is a pair
    if len(group) < 2:
        return None
    if kind == "reduce-scatter":
        size *= len(group)  # its result is a part of what is reduced
    if kind == "all-reduce" and "reduce-scatter" in computation:
        kind = "reduce-scatter"  # the TPU compiler's fusion of both
    operation = re.search(r'op_name="([^"]*)"', rest)
    return Collective(
        kind, size, times, axes, whole, group, operation.group(1) if operation else name
    )


def _between_slices(line: str, times: int, mesh_shape: Mapping[str, int]) -> Collective | None:
    """What libtpu sends through the host for a collective between slices; None for other lines."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
    sent = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = \((.*?)\) send\(", line)
    if kind is None or sent is None:
        return None
    name = kind.group(1).lower().replace("_", "-")
    size = _size(*_SHAPE.findall(sent.group(1))[0])
    slices = mesh_shape["dcn"]
    if name == "all-gather":
        size *= slices
    group = tuple(
        range(0, math.prod(mesh_shape.values()), math.prod(mesh_shape.values()) // slices)
    )
    return Collective(
        name if name in KINDS else "collective-permute", size, times, ("dcn",), True, group, name
    )


def _size(dtype: str, dims: str) -> float:
    """Bytes of an array such as bf16[8,128]."""
    bits = re.search(r"\d+", dtype)
    width = 8 if bits is None else int(bits.group())
    return math.prod(int(n) for n in dims.split(",") if n) * width / 8


def replica_groups(text: str, devices: int) -> np.ndarray | None:
    """Partitions by group, [groups, members], of the attributes of a collective; None: all are one.

    Understands {{0,1},{2,3}}, the iota form [2,4]<=[4,2]T(1,0), mesh['a'=2,'b'=4] {'b'}, and the
    source_target_pairs of collective-permute, whose first pair that moves becomes the group.
    """
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", text)
    if pairs:
        members = [
            tuple(int(i) for i in p.split(",")) for p in re.findall(r"\{([\d,]+)\}", pairs[1])
        ]
        moving = [p for p in members if p[0] != p[1]]
        return np.array(moving[:1] or [[0]])
    found = re.search(r"replica_groups=", text)
    if found is None:
        return None
    text = text[found.end() :]
    mesh = re.match(r"mesh\[([^\]]*(?:\[[^\]]*\][^\]]*)*)\]\s*\{([^}]*)\}", text)
    if mesh:
        return _mesh_groups(*mesh.groups())
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        return _iota(iota.group(2), iota.group(3)).reshape(_numbers(iota.group(1)))
    listed = re.match(r"\{((?:\{[\d,]*\},?)*)\}", text)
    groups = re.findall(r"\{([\d,]+)\}", listed.group(1)) if listed else []
    return np.array([_numbers(g) for g in groups]) if groups else np.arange(devices)[None]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    shape = _numbers(dims)
    array = np.arange(math.prod(shape)).reshape(shape)
    return array if permutation is None else array.transpose(_numbers(permutation))


def _mesh_groups(axes: str, used: str) -> np.ndarray:
    """Groups along some axes, or parts "a":(before)size of axes, of a mesh of partitions."""
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", axes)}
    ids = re.search(r"device_ids=\(\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?\)", axes)
    array = np.arange(math.prod(sizes.values()))
    if ids:
        array = _iota(ids.group(2) or ids.group(1), ids.group(3)).reshape(-1)
    shape: list[int] = []
    places: dict[tuple[str, int], int] = {}
    parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", used)
    for name, size in sizes.items():
        cuts = {1, size}
        for part, before, inside in parts:
            if part == name and before:
                cuts |= {int(before), int(before) * int(inside)}
        ordered = sorted(cuts)
        for low, high in itertools.pairwise(ordered):
            places[name, low] = len(shape)
            shape.append(high // low)
    chosen = []
    for part, before, inside in parts:
        low, high = (int(before), int(before) * int(inside)) if before else (1, sizes[part])
        chosen += [place for (n, at), place in places.items() if n == part and low <= at < high]
    rest = [place for place in range(len(shape)) if place not in chosen]
    members = math.prod(shape[place] for place in chosen)
    return array.reshape(shape).transpose(*rest, *chosen).reshape(-1, members)


def axes_of(group: Sequence[int], mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], bool]:
    """(mesh axes along which the partitions of a group differ, whether they span them wholly)."""
    places = np.array(np.unravel_index(np.asarray(group), tuple(mesh_shape.values())))
    axes = tuple(a for a, row in zip(mesh_shape, places, strict=True) if len(set(row.tolist())) > 1)
    return axes, math.prod(mesh_shape[a] for a in axes) == len(group)
