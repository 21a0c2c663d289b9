"""Where each array of a training step lies: sharding, bytes of a device, and a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from efficient_lm.config import Config
from efficient_lm.planning.compile import bytes_per_device, train_inputs
from efficient_lm.planning.tables import size, table
from efficient_lm.planning.topologies import Topology
from efficient_lm.training.optimizer import path_name

SHOWN = ("parameters", "optimizer", "average", "batch")


def placements(config: Config, topology: Topology) -> dict[str, Any]:
    """Mesh, and a row for each array: kind, path, shape, dtype, axes, split and bytes of a device.

    Nothing is allocated or compiled. `split` names for each axis of the array the mesh axes that
    divide it; `copies` is on how many devices each piece lies. ConfigError where the mesh does not
    divide the devices or the batch.
    """
    mesh, definition, inputs = train_inputs(config, topology)
    named = jax.tree_util.tree_leaves_with_path(
        definition.parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    axes = {path_name(path): leaf.axes for path, leaf in named}
    rows = []
    for kind in SHOWN:
        for path, leaf in jax.tree_util.tree_leaves_with_path(inputs[kind]):
            name = path_name(path)
            of = next((p for p in axes if name.endswith(p) and len(axes[p]) == leaf.ndim), None)
            logical = axes[of] if of else ("batch", "length") if kind == "batch" else ()
            split = split_axes(leaf)
            parts = math.prod(mesh.shape[a] for entry in split for a in entry)
            rows.append(
                {
                    "kind": kind,
                    "path": name,
                    "shape": list(leaf.shape),
                    "dtype": leaf.dtype.name,
                    "axes": list(logical),
                    "split": [list(entry) for entry in split],
                    "piece": list(leaf.sharding.shard_shape(leaf.shape)),
                    "copies": mesh.size // parts,
                    "bytes": bytes_per_device(leaf),
                }
            )
    return {"topology": topology.name, "mesh": dict(mesh.shape), "arrays": rows}


def split_axes(leaf: jax.ShapeDtypeStruct) -> list[tuple[str, ...]]:
    """For each axis of an array, the mesh axes of more than one device that divide it."""
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    entries = [*spec, *[None] * (leaf.ndim - len(spec))]
    named = [(e,) if isinstance(e, str) else tuple(e or ()) for e in entries]
    return [tuple(axis for axis in entry if mesh.shape[axis] > 1) for entry in named]


def text(plan: Mapping[str, Any]) -> str:
    """A table of the arrays and their totals by kind."""
    rows = []
    for row in plan["arrays"]:
        names = row["axes"] or [""] * len(row["shape"])
        dims = [
            f"{name}{'=' if name else ''}{n}{'/' + '.'.join(split) if split else ''}"
            for name, n, split in zip(names, row["shape"], row["split"], strict=True)
        ]
        rows.append(
            [row["path"] if row["kind"] == "parameters" else f"{row['kind']}: {row['path']}",
             row["dtype"], "x".join(map(str, row["piece"])) or "()", str(row["copies"]),
             size(row["bytes"]), ", ".join(dims)]
        )  # fmt: skip
    mesh = ", ".join(f"{axis}={n}" for axis, n in plan["mesh"].items() if n > 1) or "one device"
    totals = {}
    for row in plan["arrays"]:
        totals[row["kind"]] = totals.get(row["kind"], 0) + row["bytes"]
    header = ["array", "dtype", "piece", "copies", "a device", "axes/split over"]
    end = [f"{kind}: {size(total)} a device" for kind, total in totals.items()]
    return "\n".join([f"{plan['topology']}, mesh {mesh}", table(header, rows), *end])


def draw(plan: Mapping[str, Any], path: Path) -> None:
    """A picture of the largest arrays: which devices hold which piece.

    Each array is cut as its first two split axes are; a piece has the colour of the first device
    that holds it, and the numbers of its devices as far as they are few.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _to_draw(plan["arrays"])
    figure = Figure(figsize=(3.4 * len(rows), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    colors = colormaps["turbo"]
    devices = math.prod(plan["mesh"].values())
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        pieces = holders(row, plan["mesh"])
        axes.imshow([[colors(p[0] / max(devices - 1, 1)) for p in line] for line in pieces],
                    aspect="auto")  # fmt: skip
        if len(pieces) * len(pieces[0]) <= 64:
            for i, line in enumerate(pieces):
                for j, who in enumerate(line):
                    label = ",".join(map(str, who[:4])) + (", ..." if len(who) > 4 else "")
                    axes.text(j, i, label, ha="center", va="center", fontsize=7, color="white")
        cut = [i for i, entry in enumerate(row["split"]) if entry][:2]
        names = [row["axes"][i] if row["axes"] else str(i) for i in cut]
        axes.set(xticks=[], yticks=[], ylabel=names[0] if names else "whole")
        axes.set_xlabel(names[1] if len(names) > 1 else "")
        axes.set_title(f"{row['path'][-34:]}\n{size(row['bytes'])} a device", fontsize=8)
    figure.suptitle(f"Devices that hold each piece, {plan['topology']}", fontsize=10)
    figure.savefig(path, dpi=110)


def holders(row: Mapping[str, Any], mesh: Mapping[str, int]) -> list[list[list[int]]]:
    """Devices, as numbered by the mesh, that hold each piece along the first two cuts."""
    cut = [entry for entry in row["split"] if entry][:2]
    cut += [[]] * (2 - len(cut))
    places = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    order = [list(mesh).index(axis) for entry in cut for axis in entry]
    rest = [i for i in range(len(mesh)) if i not in order]
    shape = [math.prod(mesh[axis] for axis in entry) for entry in cut]
    return places.transpose(*order, *rest).reshape(*shape, -1).tolist()


def _to_draw(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The largest parameter of each way of splitting, and the batch: at most five."""
    chosen: dict[str, Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda row: -row["bytes"]):
        if row["kind"] in ("parameters", "batch"):
            chosen.setdefault(f"{row['kind']} {row['split']} {row['axes']}", row)
    parameters = [row for row in chosen.values() if row["kind"] == "parameters"][:4]
    return parameters + [row for row in chosen.values() if row["kind"] == "batch"][:1]
