"""Untied Ulysses: which heads meet where, what memory the stages take, and what they exchange."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.config import Config, layer, layer_options
from efficient_lm.errors import ConfigError
from efficient_lm.mixers.attention import Attention
from efficient_lm.model.context import Context
from efficient_lm.parallel.exchange import parameters_of, rebuild
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.parallel.mixing import use_mesh
from efficient_lm.parallel.upipe import make_schedule

DEVICES, LENGTH, HEAD_DIM, EMBED_DIM = 8, 4096, 8, 8
UNIT = LENGTH // DEVICES * HEAD_DIM * 4  # bytes of one head's tokens on one device, in float32


@pytest.mark.parametrize(
    ("heads", "keys"), [(8, 8), (32, 8), (32, 2), (32, 16), (64, 8), (48, 6), (32, 32)]
)
@pytest.mark.parametrize(("tensor", "devices"), [(1, 8), (1, 4), (2, 4), (1, 1), (2, 1)])
def test_every_query_head_meets_its_own_keys_once(heads, keys, tensor, devices):
    if heads % (tensor * devices):
        return
    tried = 0
    for at_once in range(1, heads + 1):
        try:
            schedule = make_schedule(heads, keys, tensor=tensor, devices=devices, at_once=at_once)
        except ConfigError:
            continue
        tried += 1
        queries = np.asarray(schedule.query_heads(jnp.arange(heads), 0))
        shared = np.asarray(schedule.key_heads(jnp.arange(keys), 0))
        assert queries.shape[-1] == at_once
        assert sorted(queries.reshape(-1)) == list(range(heads))
        # Each device has consecutive heads of a stage, and attention pairs them in order.
        for chunk, stage in itertools.product(*map(range, queries.shape[:2])):
            by_device = queries[chunk, stage].reshape(tensor * devices, -1)
            own = shared[chunk].reshape(tensor * devices, -1)
            repeated = np.repeat(own, by_device.shape[1] // own.shape[1], axis=1)
            np.testing.assert_array_equal(by_device // (heads // keys), repeated)
    assert tried >= 1


def test_a_number_of_heads_that_does_not_fit_says_what_would():
    with pytest.raises(ConfigError, match=r"heads_at_once=12 .* allowed: 8, 16, 32$"):
        make_schedule(32, 8, tensor=1, devices=8, at_once=12)


class Pointwise(Attention):
    """Attention without its kernel, so that what is measured is exchanged arrays alone."""

    def core(self, projected, context, state=None):
        query, key, value = (projected[name] for name in ("query", "key", "value"))
        return query * jnp.sin(key) + jnp.roll(value, 1, axis=1), None, {}


def traced(kind, heads, at_once, *, gradient):
    """The mixer alone on eight devices that share the tokens."""
    config = Config.from_dict(
        {
            "model": {"embed_dim": EMBED_DIM, "max_length": LENGTH,
                      "layers": (layer("attention", num_heads=heads, head_dim=HEAD_DIM),)},
            "data": {"sequence_length": LENGTH},
            "parallel": {"data": 1, "sequence": DEVICES, "heads_at_once": at_once},
        }
    )  # fmt: skip
    mesh = make_mesh(config.parallel)
    parts = SimpleNamespace()
    use_mesh(parts, mesh, config.parallel)
    graph, parameters = parameters_of(
        kind(config.model, layer_options(config.model)[0][1], nnx.Rngs(0))
    )

    def forward(arrays, x, positions):
        mixer = rebuild(graph, {p: leaf.replace(arrays[p]) for p, leaf in parameters.items()})
        context = Context(positions, shard=parts.shard, mix=parts.mix, split=parts.split)
        return parts.mix(mixer, x, context, None)[0]

    def loss(*given):
        again = jax.checkpoint(forward, policy=jax.checkpoint_policies.nothing_saveable)
        return jnp.sum(jnp.sin(again(*given)))

    def struct(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    tokens = jax.P(None, "sequence")
    arguments = (
        {p: struct(leaf.shape, jnp.float32, jax.P()) for p, leaf in parameters.items()},
        struct((1, LENGTH, EMBED_DIM), jnp.float32, tokens),
        struct((1, LENGTH), jnp.int32, tokens),
    )
    return jax.jit(jax.grad(loss, argnums=(0, 1)) if gradient else forward).trace(*arguments)


@functools.cache
def units(kind, heads, at_once, gradient):
    """Temporary memory of a device, in heads' tokens."""
    compiled = traced(kind, heads, at_once, gradient=gradient).lower().compile()
    return compiled.memory_analysis().temp_size_in_bytes / UNIT


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("heads", "share"), [(32, 0.75), (64, 0.875)])
def test_what_is_exchanged_needs_memory_for_the_heads_of_a_stage(heads, share, gradient):
    ulysses = units(Pointwise, heads, None, gradient)
    few, more = (units(Pointwise, heads, at_once, gradient) for at_once in (8, 16))
    if not gradient:
        assert ulysses == pytest.approx(6 * heads, rel=0.02)  # q, k, v before and after
    assert 1 - few / ulysses == pytest.approx(share, rel=0.1)
    assert more == pytest.approx(2 * few, rel=0.25)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_attention_in_stages_needs_memory_for_a_stage_and_not_for_all_heads(gradient):
    few, more = (units(Attention, 32, at_once, gradient) for at_once in (8, 16))
    assert units(Attention, 64, 8, gradient) == pytest.approx(few, rel=0.15)
    assert more == pytest.approx(2 * few, rel=0.15)
    assert 1 - few / units(Attention, 32, None, gradient) == pytest.approx(0.75, rel=0.1)


def exchanged(jaxpr, times=1):
    """Bytes that all-to-alls take on a device, those in loops counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "all_to_all":
            total += times * sum(v.aval.size * v.aval.dtype.itemsize for v in equation.invars)
        inner = times * equation.params.get("length", 1)
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                total += exchanged(value, inner)
    return total


@pytest.mark.parametrize("at_once", [8, 16])
def test_stages_exchange_the_bytes_of_ulysses(at_once):
    found, ulysses = (
        exchanged(traced(Attention, 32, u, gradient=False).jaxpr.jaxpr) for u in (at_once, None)
    )
    assert found == ulysses == 4 * 32 * UNIT
