"""Variants of a config on a topology: which would fit, and which could be fastest."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from efficient_lm.config import Config
from efficient_lm.errors import ConfigError
from efficient_lm.model.stack import REMAT_POLICIES
from efficient_lm.planning.estimate import Estimate, Estimator
from efficient_lm.planning.planner import make_plan
from efficient_lm.planning.topologies import Topology

# Variants that are compiled, of those that the estimate ranks first.
COMPILED = 3
# Share of the memory that an estimate may fill: what compiled was up to 10% more than estimated.
MARGIN = 0.9
TENSOR = (1, 2, 4, 8)
# Policies of remat from what keeps least. "offload" is none of them: what it costs is the time of
# the link to the host, which no bound here knows.
REMAT = ("full", "mixer", "dots", "products", "none")
assert {*REMAT, "offload"} == {*REMAT_POLICIES, "none"}


class Variant(NamedTuple):
    """A config, the flags that make it of the given one, and what is estimated of it."""

    config: Config
    flags: tuple[str, ...]
    estimate: Estimate


def search(config: Config, topology: Topology) -> list[dict[str, Any]]:
    """Rows, best first: the variants that compiled (`plan` has theirs) and then the estimated ones.

    Mesh shapes (data x fsdp x tensor, and sequence where rows are fewer than devices), microbatches
    and remat policies are estimated all; those that fit are ranked by `middle` of their bounds, and
    the first few are compiled. ConfigError when none divides.
    """
    estimator = Estimator(config, topology)
    ranked = sorted(variants(config, topology, estimator), key=lambda v: _rank(v, topology))
    if not ranked:
        raise ConfigError(
            f"no mesh divides {len(topology.devices)} devices and a batch of "
            f"{config.data.batch_size} rows; change config.data.batch_size"
        )
    rows = [_row(variant, topology) for variant in ranked]
    for row, variant in list(zip(rows, ranked, strict=True))[:COMPILED]:
        if row["fits"]:
            row["plan"] = make_plan(variant.config, topology)
    compiled = [row for row in rows if "plan" in row]
    for row in compiled:
        row["fits"] = row["plan"]["memory"]["fits"]
        row["memory"] = row["plan"]["memory"]["total"]
        row["seconds"] = row["plan"]["roofline"]["seconds"]
    best = lambda row: (not row["fits"], middle(row["seconds"]))  # noqa: E731
    return sorted(compiled, key=best) + rows[len(compiled) :]


def variants(config: Config, topology: Topology, estimator: Estimator) -> Iterator[Variant]:
    """All that divide, with their estimates."""
    slices = max(config.parallel.dcn, 1)
    rows = config.data.batch_size
    policies = {
        estimator.costs(
            dataclasses.replace(config, model=dataclasses.replace(config.model, remat=r))
        ): r
        for r in REMAT[::-1]
    }  # of policies that come to the same, the one that names least
    for parallel in meshes(config, len(topology.devices) // slices):
        for steps in divisors(rows):
            if rows % (steps * slices * parallel["data"] * parallel["fsdp"]):
                continue
            for remat in policies.values():
                try:
                    yield variant(config, estimator, parallel, steps, remat)
                except ConfigError:
                    break  # heads, tokens or features do not divide


def meshes(config: Config, devices: int) -> Iterator[dict[str, int]]:
    """Sizes of the axes inside a slice; sequence only where rows are fewer than devices."""
    scarce = config.data.batch_size < devices
    for tensor in TENSOR:
        if devices % tensor:
            continue
        for sequence in divisors(devices // tensor) if scarce else (1,):
            for fsdp in divisors(devices // tensor // sequence):
                data = devices // tensor // sequence // fsdp
                yield {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}


def variant(
    config: Config, estimator: Estimator, parallel: dict[str, int], steps: int, remat: str
) -> Variant:
    """The config with another mesh, number of microbatches and remat policy."""
    changed = dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, **parallel),
        optimizer=dataclasses.replace(config.optimizer, accumulation_steps=steps),
        model=dataclasses.replace(config.model, remat=remat),
    )
    return Variant(changed, flags_of(config, changed), estimator(changed))


def flags_of(config: Config, changed: Config) -> tuple[str, ...]:
    """The command-line flags that make one config of the other, for what `search` changes."""
    flags = []
    for section, names in (
        ("parallel", ("data", "fsdp", "sequence", "tensor")),
        ("optimizer", ("accumulation_steps",)),
        ("model", ("remat",)),
        ("data", ("batch_size",)),
    ):
        for name in names:
            new = getattr(getattr(changed, section), name)
            if new != getattr(getattr(config, section), name):
                flags.append(f"--config.{section}.{name}={new}")
    return tuple(flags)


def divisors(n: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def fits(estimate: Estimate, topology: Topology) -> bool:
    """Whether it is expected to fit, with some room for what an estimate leaves out."""
    memory = topology.chip.memory
    return memory is None or estimate.total <= MARGIN * memory


def middle(seconds: dict[str, Any]) -> float:
    """The mean of a step's bounds with all overlapped and with nothing: what ranks variants.

    No more than that is known of the overlap, and by the first bound alone links would be free.
    """
    return (seconds["overlapped"] + seconds["serial"]) / 2


def _rank(variant: Variant, topology: Topology) -> tuple:
    return (not fits(variant.estimate, topology), middle(variant.estimate.seconds))


def _row(variant: Variant, topology: Topology) -> dict[str, Any]:
    config = variant.config
    return {
        "flags": list(variant.flags),
        "mesh": {a: getattr(config.parallel, a) for a in ("data", "fsdp", "sequence", "tensor")},
        "accumulation_steps": config.optimizer.accumulation_steps,
        "remat": config.model.remat,
        "fits": fits(variant.estimate, topology),
        "memory": variant.estimate.total,
        "seconds": variant.estimate.seconds,
    }
