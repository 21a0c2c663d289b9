"""FLOPs and bytes of a program from its jaxpr: loops times their trips, kernels by their grid."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Primitives that read and write whole arrays whatever is fused with them.
MOVES = ("sort", "all_to_all", "all_gather", "ppermute")


@dataclass
class Work:
    """What a program does on all devices together.

    flops: of products by kind ("product", "ragged product", "kernel NAME", ...); element-wise work
      is left out. split_bytes, whole_bytes: operands and results of products and kernels, and what
      is gathered or scattered, read or written once each; split: of arrays that the batch is in,
      which devices share; whole: of weights, which every device reads in full wherever they are
      gathered.
    saved_bytes: results that a loop over layers stacks for the loop of its backward pass.
    notes: what had to be guessed.
    """

    flops: Counter = field(default_factory=Counter)
    split_bytes: float = 0.0
    whole_bytes: float = 0.0
    saved_bytes: float = 0.0
    notes: set = field(default_factory=set)

    def total(self) -> float:
        """FLOPs of all kinds."""
        return float(sum(self.flops.values()))

    def add(self, other: "Work", times: float | int = 1) -> None:
        """Add the work of something that runs `times` times."""
        for kind, flops in other.flops.items():
            self.flops[kind] += flops * times
        self.split_bytes += other.split_bytes * times
        self.whole_bytes += other.whole_bytes * times
        # Residuals of a loop's body are freed before its next turn.
        self.saved_bytes += other.saved_bytes
        self.notes |= other.notes


@dataclass(frozen=True)
class _Known:
    """Of a value: whether the batch is in it, its array, whether a loop stacked it."""

    split: bool = False
    array: Any = None
    stacked: bool = False


def count(closed_jaxpr: Any, batch_inputs: list[bool]) -> Work:
    """The work of a traced program (`jax.jit(f).trace(...).jaxpr`).

    batch_inputs: for each flat argument, whether it is of the batch (else: of the parameters).
    Scans count times their length, both branches of a condition as the dearer one, shard_map
    bodies times the devices they run on, ragged products by rows (not times the groups), splash
    attention by the tiles its mask leaves. A while loop without a plain bound counts once (noted).
    """
    inputs = [_Known(split=split) for split in batch_inputs]
    work, _ = _visit(*_open(closed_jaxpr), inputs)
    return work


def _visit(jaxpr, consts, inputs: list[_Known]) -> tuple[Work, list[_Known]]:
    """The work of a jaxpr and what is known of its results."""
    work = Work()
    known: dict[Any, _Known] = {}
    for variable, value in zip(jaxpr.constvars, consts, strict=True):
        known[variable] = value if isinstance(value, _Known) else _Known(array=value)
    known.update(zip(jaxpr.invars, inputs, strict=True))

    def look(atom) -> _Known:
        return _Known(array=atom.val) if hasattr(atom, "val") else known.get(atom, _Known())

    for equation in jaxpr.eqns:
        given = [look(atom) for atom in equation.invars]
        outputs = _equation(work, equation, given)
        if outputs is None:
            outputs = [_Known(split=any(k.split for k in given))] * len(equation.outvars)
        known.update(zip(equation.outvars, outputs, strict=True))
    return work, [look(atom) for atom in jaxpr.outvars]


def _equation(work: Work, equation, given: list[_Known]) -> list[_Known] | None:
    """Add the work of one equation; what is known of its results, None: as of its operands."""
    name, parameters = equation.primitive.name, equation.params
    if name in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
        return _product(work, equation, given)
    if name == "scan":
        return _scan(work, equation, given)
    if name == "while":
        return _while(work, equation, given)
    if name == "cond":
        branches = [_visit(*_open(b), given[1:]) for b in parameters["branches"]]
        work.add(max((branch[0] for branch in branches), key=lambda w: w.total()))
        return branches[0][1]
    if name == "pallas_call":
        _kernel(work, equation, given)
        return None
    if name == "shard_map":
        mesh, manual = parameters["mesh"], parameters["newly_manual_axes"]
        inside, outputs = _visit(*_open(parameters["jaxpr"]), given)
        devices = math.prod(mesh.shape[axis] for axis in manual)
        # Bytes inside are of one device already, also those of weights that it gathered.
        inside.split_bytes, inside.whole_bytes = inside.split_bytes + inside.whole_bytes, 0.0
        work.add(inside, devices)
        work.saved_bytes += inside.saved_bytes * (devices - 1)
        return outputs
    if name.startswith("dot_product_attention"):
        _fused_attention(work, equation)
        return None
    if name == "gather" or name.startswith("scatter"):
        # Of the array itself only what the indices name: rows of a cache are written in place.
        _, *indices = zip(equation.invars, given, strict=True)
        split = _Known(split=any(k.split for k in given))
        rows = (equation.outvars[0], split) if name == "gather" else indices.pop()
        _add_bytes(work, [*indices, rows, rows])
        return None
    if name in MOVES:
        _traffic(work, equation, given)
        return None
    for inner in _inner(parameters):
        jaxpr, consts = _open(inner)
        if len(jaxpr.invars) == len(given) and len(jaxpr.outvars) == len(equation.outvars):
            inside, outputs = _visit(jaxpr, consts, given)
            work.add(inside)
            return outputs  # custom rules also hold a jaxpr of their gradient, which does not run
        work.notes.add(f"{name} is counted without its operands")
        work.add(_visit(jaxpr, consts, [_Known()] * len(jaxpr.invars))[0])
        return None
    return None


def _inner(parameters: dict[str, Any]):
    """The jaxprs among the parameters of an equation."""
    for value in parameters.values():
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield value


def _product(work: Work, equation, given: list[_Known]) -> list[_Known]:
    """2 M N K, times the batch; a ragged product by its rows, whatever the number of groups."""
    parameters, (left, right) = equation.params, (a.aval for a in equation.invars[:2])
    result = equation.outvars[0].aval
    split = any(k.split for k in given[:2])
    if equation.primitive.name == "dot_general":
        (contracted, _), (batch, _) = parameters["dimension_numbers"]
        work.flops["product"] += 2.0 * result.size * math.prod(left.shape[i] for i in contracted)
        # Two arrays of tokens multiplied over the tokens: the gradient of a weight.
        split &= not (given[0].split and given[1].split and not batch)
    elif equation.primitive.name == "ragged_dot_general":
        numbers = parameters["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batch) = numbers.dot_dimension_numbers
        used = (*contracted, *batch, *numbers.rhs_group_dimensions)
        free = math.prod(n for i, n in enumerate(right.shape) if i not in used)
        work.flops["ragged product"] += 2.0 * left.size * free
    else:
        kernel = parameters["dimension_numbers"].rhs_spec
        per_result = right.size / right.shape[kernel[0]]
        work.flops["convolution"] += 2.0 * result.size * per_result
    known = [_Known(split=split)]
    _traffic(work, equation, given, known)
    return known


def _traffic(work: Work, equation, given, results=None) -> None:
    """Bytes of all operands and results, once each."""
    results = results or [_Known(split=any(k.split for k in given))] * len(equation.outvars)
    _add_bytes(work, [*zip(equation.invars, given), *zip(equation.outvars, results)])  # noqa: B905


def _add_bytes(work: Work, values: list[tuple[Any, _Known]]) -> None:
    """Bytes of these atoms, by whether the batch is in them."""
    for atom, value in values:
        size = _bytes(atom.aval)
        if value.split:
            work.split_bytes += size
        else:
            work.whole_bytes += size


def _bytes(aval) -> float:
    return float(aval.size * aval.dtype.itemsize) if hasattr(aval, "shape") else 0.0


def _on_host(aval) -> bool:
    """Whether an array waits in the memory of the host."""
    return "host" in str(getattr(aval, "memory_space", "")).lower()


def _scan(work: Work, equation, given: list[_Known]) -> list[_Known]:
    closed, length = equation.params["jaxpr"], equation.params["length"]
    jaxpr = _open(closed)[0]
    # What is scanned or stacked has one axis more than in the body: constants, carry, scanned.
    scanned = _deeper(equation.invars, jaxpr.invars)
    carry = len(equation.outvars) - _deeper(equation.outvars, jaxpr.outvars)
    consts = len(given) - scanned - carry
    # What the batch enters in one turn is of the batch from then on.
    inputs = list(given)
    for _ in range(2):
        inside, outputs = _visit(*_open(closed), inputs)
        for i in range(carry):
            inputs[consts + i] = _Known(split=inputs[consts + i].split or outputs[i].split)
    work.add(inside, length)
    reverse = equation.params["reverse"]
    if reverse:
        xs = zip(equation.invars[consts + carry :], given[consts + carry :], strict=True)
        work.saved_bytes += sum(
            _bytes(atom.aval) for atom, k in xs if k.stacked and k.split and not _on_host(atom.aval)
        )
    return [_Known(o.split, stacked=not reverse and i >= carry) for i, o in enumerate(outputs)]


def _open(jaxpr) -> tuple[Any, Any]:
    """A jaxpr and its constants, closed or not."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _deeper(outside, inside) -> int:
    """How many of the outer values have an axis that the inner ones lack."""
    return sum(len(o.aval.shape) > len(i.aval.shape) for o, i in zip(outside, inside, strict=True))


def _while(work: Work, equation, given: list[_Known]) -> list[_Known]:
    parameters = equation.params
    first = parameters["cond_nconsts"]
    body = parameters["body_jaxpr"]
    inside, outputs = _visit(*_open(body), given[first:])
    trips = _trips(_open(parameters["cond_jaxpr"])[0], given[:first] + given[first:][
        parameters["body_nconsts"] :])  # fmt: skip
    if trips is None and inside.total():
        work.notes.add("a while loop without a plain bound is counted once")
    work.add(inside, 1 if trips is None else trips)
    return outputs


def _trips(condition, given: list[_Known]) -> int | None:
    """Turns of `i < n` loops that count up by one from a known start to a known end."""
    if len(condition.eqns) != 1 or condition.eqns[0].primitive.name != "lt":
        return None
    inside = dict(zip(condition.invars, given, strict=True))
    bounds = [a.val if hasattr(a, "val") else inside.get(a, _Known()).array
              for a in condition.eqns[0].invars]  # fmt: skip
    return None if any(b is None for b in bounds) else max(0, int(bounds[1]) - int(bounds[0]))


def _kernel(work: Work, equation, given: list[_Known]) -> None:
    """A Pallas kernel: its own estimate, or its body times its grid, less what masks leave."""
    parameters = equation.params
    name = getattr(parameters.get("name_and_src_info"), "name", None) or parameters.get("name")
    kind = f"kernel {name or 'without a name'}"
    _traffic(work, equation, given)
    if parameters.get("cost_estimate") is not None:
        work.flops[kind] += float(parameters["cost_estimate"].flops)
        return
    mapping, body = parameters["grid_mapping"], parameters["jaxpr"]
    inside, _ = _visit(*_open(body), [_Known()] * len(body.invars))
    turns = math.prod(n for n in mapping.grid if isinstance(n, int))
    if any(not isinstance(n, int) for n in mapping.grid):
        work.notes.add(f"{kind} has a grid of unknown size")
    share = 1.0
    if kind.startswith("kernel splash"):
        # Its scalars: which block comes next, and what the mask leaves of each block (0: nothing).
        left = given[1].array
        if left is None:
            work.notes.add(f"{kind} is counted without its mask")
        else:
            share = float(np.mean(np.asarray(left) != 0))
    work.flops[kind] += inside.total() * turns * share
    work.notes |= inside.notes


def _fused_attention(work: Work, equation) -> None:
    """cuDNN attention: 2 products forward, 5 backward; a causal mask leaves half of the tiles."""
    query, key = equation.invars[0].aval, equation.invars[1].aval  # [B, T, N, H], [B, S, K, H]
    backward = "bwd" in equation.primitive.name
    one = 2.0 * query.size * key.shape[1]
    causal = "CAUSAL" in str(equation.params.get("mask_type"))
    work.flops["kernel cudnn"] += one * (5 if backward else 2) * (0.5 if causal else 1.0)
    _traffic(work, equation, [_Known(split=True)] * len(equation.invars))
