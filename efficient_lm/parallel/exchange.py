"""What mixers on a mesh share: tokens exchanged for heads, and parameters cut by heads."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from efficient_lm.model.context import Context, Split, no_sharding, run_mixer
from efficient_lm.parallel.rules import ROWS, TOKENS

HEADS = ("tensor", "sequence")  # the mesh axes that split the heads of a core
HEAD_AXES = ("heads", "key_value_heads")


class Exchange:
    """Arrays [B, T, heads, ...] between the layouts of tokens and of heads, and cores on shards."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.devices = mesh.shape["sequence"]
        self.shards = math.prod(mesh.shape[axis] for axis in HEADS)
        self.ring = "ring" if mesh.shape["ring"] > 1 else None

    def to_heads(self, x: Float[Array, "B T N *rest"]) -> Float[Array, "B T N *rest"]:
        """Split by heads what is split by tokens: an all-to-all over "sequence"."""
        return self._exchange(x, P(ROWS, TOKENS, "tensor"), P(ROWS, "ring", HEADS), 2, 1)

    def to_tokens(self, x: Float[Array, "B T N *rest"]) -> Float[Array, "B T N *rest"]:
        """The inverse of `to_heads`."""
        return self._exchange(x, P(ROWS, "ring", HEADS), P(ROWS, TOKENS, "tensor"), 1, 2)

    def _exchange(self, x, before: P, after: P, split_axis: int, concat_axis: int):
        if self.devices == 1:
            return x

        def local(x):
            return jax.lax.all_to_all(
                x, "sequence", split_axis=split_axis, concat_axis=concat_axis, tiled=True
            )

        return jax.shard_map(
            local, mesh=self.mesh, in_specs=before, out_specs=after, check_vma=False
        )(x)

    def core(self, mixer: Any, entries: dict[str, Array], context: Context) -> Array:
        """`mixer.core` on each device's rows and heads."""
        rows = context.positions.shape[0]
        graph, parameters = parameters_of(mixer)
        inside = {
            path: repeat_heads(self, mixer, leaf[...], *head_axis(leaf))
            for path, leaf in parameters.items()
            if "embed" not in axes_of(leaf)
        }
        specs = {
            path: P(*(HEADS if axis in HEAD_AXES else None for axis in axes_of(parameters[path])))
            for path in inside
        }
        alone = dataclasses.replace(
            context, shard=no_sharding, mix=run_mixer, split=Split(ring=self.ring)
        )
        leaves, structure = jax.tree.flatten(alone)

        def context_spec(leaf):
            first = ROWS if leaf.shape[0] == rows else None
            return P(first, "ring") if leaf.ndim > 1 else P(first)

        def local(inside, entries, leaves):
            whole = {path: leaf.replace(inside.get(path)) for path, leaf in parameters.items()}
            context = jax.tree.unflatten(structure, leaves)
            mixed, _, aux = rebuild(graph, whole).core(entries, context)
            if aux:
                raise ValueError(
                    f"{type(mixer).__name__}.core returned auxiliary values ({', '.join(aux)}); "
                    "devices hold other heads of them, so a core on a mesh must return none"
                )
            return mixed

        head_spec = P(ROWS, "ring", HEADS)
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(specs, head_spec, [context_spec(leaf) for leaf in leaves]),
            out_specs=head_spec,
            check_vma=False,  # kernels do not say over which axes their results vary
        )(inside, entries, leaves)


def parameters_of(mixer: Any) -> tuple[nnx.GraphDef, dict[tuple, nnx.Param]]:
    """The structure of a module and its parameters by path."""
    graph, state = nnx.split(mixer)
    return graph, dict(nnx.to_flat_state(state))


def rebuild(graph: nnx.GraphDef, parameters: dict[tuple, nnx.Param]) -> Any:
    """The inverse of `parameters_of`, with arrays of other head counts if need be."""
    return nnx.merge(graph, nnx.from_flat_state(parameters))


def axes_of(parameter: nnx.Param) -> tuple[str, ...]:
    """Logical axes of the array at hand, which inside a scan has lost its axis of layers."""
    return parameter.axes[len(parameter.axes) - parameter[...].ndim :]


def head_axis(parameter: nnx.Param) -> tuple[str | None, int]:
    """(the head axis of a parameter or None, its place)."""
    axes = axes_of(parameter)
    return next(((axis, axes.index(axis)) for axis in HEAD_AXES if axis in axes), (None, 0))


def head_count(mixer: Any, axis: str) -> int:
    """Heads along `axis` in a mixer's parameters; those of "heads" where it has no such axis."""
    counts = {}
    for leaf in parameters_of(mixer)[1].values():
        name, place = head_axis(leaf)
        counts[name] = leaf[...].shape[place] if name else 0
    return counts.get(axis, counts["heads"])


def repeat_heads(exchange: Exchange, mixer: Any, x: Array, axis: str | None, place: int) -> Array:
    """Key-value heads repeated to the fewest that the devices can share; other arrays as they are.

    A device's query heads are consecutive, and so are the key-value heads that they belong to.
    """
    if axis != "key_value_heads":
        return x
    heads = head_count(mixer, axis)
    return jnp.repeat(x, math.lcm(heads, exchange.shards) // heads, axis=place)
