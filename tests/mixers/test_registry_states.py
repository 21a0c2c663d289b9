"""What every registered mixer traces to: fp32 where it must be, sizes as published, one program."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from efficient_lm import registry
from efficient_lm.config import ModelConfig
from efficient_lm.model.context import Context
from efficient_lm.model.definition import define, initialize
from efficient_lm.model.rope import RopeConfig
from tests.mixers.cases import CASES, EMBED_DIM, LENGTH, one_layer

ALL = [(mixer, case) for mixer, cases in CASES.items() for case in cases]
over_cases = pytest.mark.parametrize(("mixer", "case"), ALL, ids=["-".join(c) for c in ALL])
OPS = ("gated_delta_rule", "gated_linear_attention", "second_order_attention")
RECURRENT = [(m, c) for m, c in ALL if m not in ("attention", "ttt") and c != "exponential"]


def options_of(mixer, case):
    """Those of a case as a mixer takes them."""
    options = CASES[mixer][case]
    if "rope" in options:
        options = options | {"rope": RopeConfig(**options["rope"])}
    return registry.mixer(mixer).Options(**options)


@pytest.mark.parametrize(("mixer", "case"), RECURRENT, ids=["-".join(c) for c in RECURRENT])
def test_decays_are_fp32_where_all_else_is_bf16(mixer, case, monkeypatch, rng):
    """Of bf16 parameters and projections they are what fp32 gives for the same numbers."""
    model = ModelConfig(embed_dim=EMBED_DIM, num_layers=1, initializer="fan_in", dtype="bfloat16")
    graph, arrays = nnx.split(registry.mixer(mixer)(model, options_of(mixer, case), nnx.Rngs(0)))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
    x = jnp.asarray(rng.standard_normal((1, LENGTH, EMBED_DIM)), jnp.bfloat16)
    context = Context(positions=jnp.arange(LENGTH, dtype=jnp.int32)[None])
    projected = nnx.merge(graph, half).project(x, context)
    given = []

    def op(q, k, v, *gates, **options):
        given.append(gates)
        return v, None

    for name in OPS:
        monkeypatch.setattr(pallas_kernels, name, op)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (half, projected))
    for arrays, inputs in ((half, projected), wide):
        nnx.merge(graph, arrays).core(inputs, context)
    for found, expected in zip(*given, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.dtype == jnp.float32
            np.testing.assert_array_equal(found, expected)
            assert np.any(found != found.astype(jnp.bfloat16).astype(jnp.float32))


@over_cases
def test_states_keep_their_types_and_their_size(mixer, case):
    """Memories are fp32 also where all else is bf16; only caches and reads of all tokens grow."""
    half = define(one_layer(mixer, CASES[mixer][case], dtype="bfloat16"))
    tokens = jnp.zeros((2, 3), jnp.int32)

    def shapes(length):
        def advance():
            model = half.bind(initialize(half, jax.random.key(0)))
            state = model.init_state(len(tokens), length)
            return state, model(tokens, state=state, logits=False).state

        return jax.eval_shape(advance)

    before, after = shapes(64)
    assert before == after
    for path, leaf in jax.tree_util.tree_leaves_with_path(before):
        names = {key.key for key in path if hasattr(key, "key")}
        if names & {"memory", "changes", "momentum", "largest", "rate", "share", "log_decay"}:
            assert leaf.dtype == jnp.float32, path
    options = CASES[mixer][case]
    reads_all = mixer == "attention" and "window" not in options
    reads_all = reads_all or options.get("score") == "exponential"
    assert (before != shapes(256)[0]) == reads_all
    flops = functools.partial(
        registry.mixer(mixer).core_flops, half.config, options_of(mixer, case)
    )
    assert (flops(2**16) < flops(2**20)) == reads_all and flops(2**16) <= flops(2**20)


HEAD = {"key_dim": 6, "value_dim": 4}
STATES = [  # numbers of each of two heads, for K = 6 and V = 4
    ("gated_deltanet", {"num_value_heads": 2, **HEAD}, 6 * 4 + 3 * (2 * 6 + 4)),
    ("kda", {"num_value_heads": 2, **HEAD}, 6 * 4 + 3 * (2 * 6 + 4)),
    ("linear_attention", {"num_heads": 2, **HEAD}, 6 * 4 + 6),  # and the sum of weights
    (
        "linear_attention",
        {"num_heads": 2, **HEAD, "feature_map": "hedgehog", "normalize": "rms"},
        2 * 6 * 4,
    ),
    ("mamba2", {"head_dim": 16, "state_dim": 6, "num_groups": 2}, 6 * 16 + 3 * (2 * 6 + 16)),
    ("two_mamba", {"num_heads": 2, "score": "linear"}, 8 * 8 + 3 * 8),
]


@pytest.mark.parametrize(("mixer", "options", "numbers"), STATES, ids=lambda x: str(x)[:20])
def test_states_have_as_many_numbers_as_published(mixer, options, numbers):
    registered = registry.mixer(mixer)
    model = ModelConfig(embed_dim=EMBED_DIM, num_layers=1)
    one = registered(model, registered.Options(**options), nnx.Rngs(0))
    leaves = jax.tree.leaves(one.init_state(1, 64, jnp.float32))
    found = sum(leaf.size for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
    assert found == 2 * numbers


TRACE_ALL = """
import jax, jax.numpy as jnp
from efficient_lm.config import ModelConfig, layer
from efficient_lm.model.definition import define
from tests.mixers.cases import CASES, EMBED_DIM, LENGTH
layers = tuple(layer(mixer, **next(iter(cases.values()))) for mixer, cases in CASES.items())
model = define(ModelConfig(embed_dim=EMBED_DIM, num_layers=len(layers), layers=layers))
tokens = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
hidden = lambda arrays, tokens: model.bind(arrays)(tokens, segment_ids=tokens, logits=False).hidden
print(jax.jit(hidden).lower(model.parameters, tokens).as_text())
"""


def test_processes_trace_the_same_programs():
    """Hosts must agree on them, and JAX's cache finds them again, whatever the order of sets."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRACE_ALL],
            env=os.environ | {"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    (first, _), (second, _) = (process.communicate() for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert len(first) > 10_000
    assert first == second
