"""The portable recurrent ops inside jax.shard_map, which checks what varies over the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from recurrence_cases import Case, lengths

import pallas_kernels

RUNS = [
    ("gated_delta_rule", "ref", "scalar"),
    ("gated_delta_rule", "xla", "scalar"),
    ("gated_delta_rule", "xla", "vector"),
    ("gated_linear_attention", "ref", "none"),
    ("gated_linear_attention", "xla", "scalar"),
    ("gated_linear_attention", "xla", "vector"),
    ("second_order_attention", "xla_chunks", "scalar"),
    ("second_order_attention", "xla_recurrent", "scalar"),
]


@pytest.mark.parametrize(("op", "implementation", "decay"), RUNS, ids=lambda x: x)
def test_heads_of_two_devices_equal_those_of_one(op, implementation, decay):
    """Segments are the same on both, as are the gradients of all that is."""
    case = Case(B=1, T=20, H=2, N=4, K=4, V=4, decay=decay, segments=lengths((1, 9), (2, 11)))
    arguments = {name: x for name, x in case.arguments().items() if x is not None}
    if op != "gated_delta_rule":
        del arguments["beta"]
    everywhere = jax.tree.map(lambda x: x[:, :, :1], arguments.pop("v"))  # one value for all heads

    def run(arguments, value, segments):
        v = jnp.broadcast_to(value, (*arguments["q"].shape[:2], 2, 4))
        return getattr(pallas_kernels, op)(
            v=v, segment_ids=segments, output_final_state=True, implementation=implementation,
            **({"g": None} | arguments),
        )  # fmt: skip

    mesh = jax.make_mesh((2,), ("device",), axis_types=(jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:2])  # fmt: skip
    heads = P(None, None, "device")
    split = jax.shard_map(
        run, mesh=mesh, in_specs=(heads, P(), P()), out_specs=(heads, P(None, "device"))
    )

    def in_turn(arguments, value, segments):
        halves = zip(*(jnp.split(x, 2, axis=2) for x in arguments.values()), strict=True)
        (o, state), (later_o, later_state) = (
            run(dict(zip(arguments, half, strict=True)), value, segments) for half in halves
        )
        return jnp.concatenate([o, later_o], 2), jnp.concatenate([state, later_state], 1)

    def loss(function):
        def total(arguments, value):
            o, state = function(arguments, value, case.segment_ids)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(state))

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))

    found, expected = (loss(f)(arguments, everywhere) for f in (split, in_turn))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
