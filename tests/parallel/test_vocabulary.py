"""The embedding on a mesh: the rows of the table that tokens name, however it is split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import ParallelConfig
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.parallel.rules import batch_sharding
from efficient_lm.parallel.vocabulary import over_tokens


@pytest.mark.parametrize(("length", "gathered"), [(4, True), (1, False)])
def test_a_step_of_decoding_leaves_the_table_where_it_is(rng, length, gathered):
    mesh = make_mesh(ParallelConfig(data=1, fsdp=2, tensor=4))
    table = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 64, (8, length)), jnp.int32)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor", "fsdp"))
    look_up = jax.jit(
        functools.partial(
            over_tokens, mesh, "fsdp", lambda table, tokens: jnp.take(table, tokens, axis=0),
            dtype=jnp.float32, summed=False,
        )
    )  # fmt: skip
    arguments = jax.device_put(table, split), jax.device_put(tokens, batch_sharding(mesh))
    np.testing.assert_array_equal(look_up(*arguments), table[tokens])
    text = look_up.lower(*arguments).compile().as_text()
    assert ("f32[64,16]" in text) == gathered
