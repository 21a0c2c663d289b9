"""What to change in a step that does not fit."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from efficient_lm.config import Config
from efficient_lm.errors import UserError
from efficient_lm.parallel.rules import ROWS
from efficient_lm.planning.estimate import Estimator
from efficient_lm.planning.planner import make_plan
from efficient_lm.planning.search import REMAT, fits, flags_of
from efficient_lm.planning.tables import size
from efficient_lm.planning.topologies import Topology, find_topology

# Changes that are compiled before giving up.
TRIES = 3


def advise(config: Config, topology: Topology, plan: dict[str, Any]) -> str:
    """The nearest change of a training step that does not fit which does, as flags.

    Changes of one field come first: less kept for the backward pass, more microbatches, parameters
    split over more devices; then two of them; then activations on the host, fewer rows, a larger
    slice. Estimates choose, scaled by how far the given plan is from its own; the compiler decides.
    """
    estimator = Estimator(config, topology)
    off = max(plan["memory"]["total"] / estimator(config).total, 1.0)
    tried = 0
    for changed in changes(config, len(topology.devices)):
        try:
            estimate = estimator(changed)
        except UserError:
            continue  # does not divide
        if estimate.total * off > topology.chip.memory:
            continue
        try:
            compiled = make_plan(changed, topology)
        except UserError:
            continue
        if compiled["memory"]["fits"]:
            return _line(config, changed, compiled)
        tried += 1
        if tried == TRIES:
            break
    return _larger_slice(config, topology)


def _larger_slice(config: Config, topology: Topology) -> str:
    """The smallest larger slice that fits by compiling, all of its devices in fsdp."""
    kind = topology.name.rpartition(" ")[2].partition(":")[0]
    shape, tried = topology.shape, 0
    parallel = dataclasses.replace(config.parallel, data=1, fsdp=-1)
    while shape and tried < TRIES:
        at = shape.index(min(shape))
        shape = (*shape[:at], 2 * shape[at], *shape[at + 1 :])
        name = f"{kind}:{'x'.join(map(str, shape))}"
        try:
            larger = find_topology(name, max(config.parallel.dcn, 1))
        except UserError:
            break  # beyond a pod
        larger = dataclasses.replace(larger, chip=topology.chip)
        steps = config.optimizer.accumulation_steps
        rows = math.ceil(config.data.batch_size / steps / len(larger.devices))
        data = dataclasses.replace(
            config.data, batch_size=max(config.data.batch_size, rows * steps * len(larger.devices))
        )
        changed = dataclasses.replace(
            config,
            data=data,
            parallel=parallel,
            model=dataclasses.replace(config.model, remat="full"),
        )
        try:
            if not fits(Estimator(changed, larger)(changed), larger):
                continue
            tried += 1
            compiled = make_plan(changed, larger)
        except UserError:
            continue  # does not divide
        if compiled["memory"]["fits"]:
            return f"--topology={name} {_line(config, changed, compiled)}"
    return "none found in remat, microbatches, fsdp, batch size and larger slices"


def _line(config: Config, changed: Config, plan: dict[str, Any]) -> str:
    """Flags, and what compiling them gave."""
    flags = " ".join(flags_of(config, changed))
    return f"{flags} (compiled: {size(plan['memory']['total'])} a device)".lstrip()


def changes(config: Config, devices: int) -> Iterator[Config]:
    """Neighbours of a config that need less memory, the nearest first."""

    def remat(config, policy):
        return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=policy))

    def micro(config, factor):
        steps = config.optimizer.accumulation_steps * factor
        return dataclasses.replace(
            config, optimizer=dataclasses.replace(config.optimizer, accumulation_steps=steps)
        )

    def split(config):
        return dataclasses.replace(
            config, parallel=dataclasses.replace(config.parallel, data=1, fsdp=-1)
        )

    def batch(config, rows):
        return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows))

    rows = config.data.batch_size
    offloads = config.model.remat == "offload"
    less = () if offloads else REMAT[: REMAT.index(config.model.remat)][::-1]
    factors = [f for f in (2, 4, 8, 16, 32, 64)
               if rows % (f * config.optimizer.accumulation_steps) == 0]  # fmt: skip
    whole = config.parallel.data != 1
    for policy in less:
        yield remat(config, policy)
    for factor in factors:
        yield micro(config, factor)
    if whole:
        yield split(config)
    for factor in factors:
        for policy in less:
            yield remat(micro(config, factor), policy)
        if whole:
            yield split(micro(config, factor))
            yield from (remat(split(micro(config, factor)), policy) for policy in less)
    if not offloads:
        yield remat(config, "offload")
        yield from (remat(micro(config, factor), "offload") for factor in factors)
    smaller = rows // 2
    while smaller and smaller >= devices:
        yield remat(batch(config, smaller), "full")
        smaller //= 2


def advise_decoding(plan: dict[str, Any]) -> str:
    """The same for a plan of decoding, by arithmetic: fewer rows, or more devices a copy."""
    memory, step = plan["memory"], plan["step"]
    cache = sum(row["bytes"] for row in memory["rows"] if row["kind"] == "cache")
    copies = math.prod(plan["mesh"][axis] for axis in ROWS)
    room = memory["available"] - (memory["total"] - cache)
    rows = int(step["batch"] * room / cache) // copies * copies if cache else 0
    if rows >= 1:
        return f"--batch={rows} (by arithmetic)"
    return "a larger config.parallel.tensor or fsdp, or more chips: the weights alone do not fit"
