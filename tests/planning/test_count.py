"""FLOPs from the jaxpr against hand arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from efficient_lm.config import Config
from efficient_lm.planning.compile import train_program
from efficient_lm.planning.count import count
from efficient_lm.planning.topologies import find_topology
from efficient_lm.training.flops import training_flops_per_token

M, K, N, L = 32, 64, 16, 5


def work(function, *arguments, batch=()):
    closed = jax.jit(function).trace(*arguments).jaxpr
    return count(closed, [i in batch for i in range(len(closed.in_avals))])


def test_a_product_is_two_m_n_k():
    result = work(jnp.matmul, jnp.zeros((M, K)), jnp.zeros((K, N)), batch=(0,))
    assert result.total() == 2 * M * K * N
    assert result.split_bytes == 4 * (M * K + M * N)
    assert result.whole_bytes == 4 * K * N


def test_of_tables_and_caches_only_the_rows_that_are_named_count():
    table, places, rows = jnp.zeros((M, K)), jnp.zeros((3, 1), jnp.int32), jnp.zeros((3, K))
    moved = 2 * rows.nbytes + places.nbytes
    take = lambda table, places: table.at[places[:, 0]].get(mode="promise_in_bounds")  # noqa: E731
    put = lambda table, places, rows: table.at[places[:, 0]].set(  # noqa: E731
        rows, mode="promise_in_bounds"
    )
    assert work(take, table, places, batch=(1,)).split_bytes == moved
    assert work(put, table, places, rows, batch=(1, 2)).split_bytes == moved
    assert work(take, table, places, batch=(1,)).whole_bytes == 0


def test_a_scan_counts_its_trips_and_remat_what_it_computes_again():
    def loss(weights, x, policy):
        layer = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return jax.lax.scan(jax.checkpoint(layer, policy=policy), x, weights)[0].sum()

    weights, x = jnp.zeros((L, K, K)), jnp.zeros((M, K))
    one = 2 * M * K * K * L
    assert work(lambda w, x: loss(w, x, None), weights, x).total() == one
    for policy, products in (
        (jax.checkpoint_policies.nothing_saveable, 4),
        (jax.checkpoint_policies.everything_saveable, 3),
    ):
        step = jax.value_and_grad(lambda w, x, p=policy: loss(w, x, p))
        result = work(step, weights, x, batch=(1,))
        assert result.total() == products * one
        assert result.saved_bytes >= 4 * L * M * K


def test_weight_gradients_are_whole_and_activations_split():
    step = jax.grad(lambda w, x: (x @ w).sum(), argnums=(0, 1))
    result = work(step, jnp.zeros((K, N)), jnp.zeros((M, K)), batch=(1,))
    # Written: the result, both gradients; read: x and w, w and g, x and g. g has no batch in it.
    assert result.whole_bytes >= 4 * 2 * K * N


@pytest.mark.parametrize("groups", [1, 4])
def test_ragged_products_count_rows_not_groups(groups):
    x, w = jnp.zeros((M, K)), jnp.zeros((groups, K, N))
    sizes = jnp.full((groups,), M // groups, jnp.int32)
    run = lambda x, w: jax.lax.ragged_dot(x, w, sizes).sum()  # noqa: E731
    assert work(run, x, w).total() == 2 * M * K * N
    both = work(jax.value_and_grad(run, argnums=(0, 1)), x, w)
    assert both.total() == 3 * 2 * M * K * N


def test_shard_map_counts_every_device_and_conditions_their_dearer_branch():
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("a")
    run = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()),
                        out_specs=rows, check_vma=False)  # fmt: skip
    x, w = jnp.zeros((M, K)), jnp.zeros((K, K))
    result = work(run, x, w)
    assert result.total() == 2 * M * K * K
    assert (result.split_bytes, result.whole_bytes) == (4 * (2 * M * K + 4 * K * K), 0)

    def either(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x)

    assert work(either, x, w).total() == 2 * 2 * M * K * K


def test_loops_with_a_bound_count_their_trips_and_others_once_with_a_note():
    x, w = jnp.zeros((M, K)), jnp.zeros((K, K))
    bounded = work(lambda x, w: jax.lax.fori_loop(0, 3, lambda i, x: x @ w, x), x, w)
    assert bounded.total() == 3 * 2 * M * K * K and not bounded.notes
    open_ended = work(
        lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ w, x), x, w
    )
    assert open_ended.total() == 2 * M * K * K and open_ended.notes


def test_kernels_count_their_grid():
    from jax.experimental import pallas as pl

    def kernel(x, w, out):
        out[...] = jnp.dot(x[...], w[...])

    run = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((M, N), jnp.float32),
        grid=(4,),
        in_specs=[
            pl.BlockSpec((M // 4, K), lambda i: (i, 0)),
            pl.BlockSpec((K, N), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((M // 4, N), lambda i: (i, 0)),
        name="rows",
    )
    assert dict(work(run, jnp.zeros((M, K)), jnp.zeros((K, N))).flops) == {
        "kernel rows": 2 * M * K * N
    }


def config(**model):
    return Config.from_dict(
        {
            "model": {"vocabulary_size": 256, "embed_dim": 64, "num_layers": 3, "max_length": 128,
                      "mixers": {"attention": {"num_heads": 4, "implementation": "ref"}}} | model,
            "data": {"sequence_length": 128, "batch_size": 8},
            "objective": {"implementation": "ref"},
        }
    )  # fmt: skip


def counted(config):
    program = train_program(config, find_topology("local"))
    batch = [n == "batch" for n, tree in program.inputs.items() for _ in jax.tree.leaves(tree)]
    tokens = config.data.batch_size * config.data.sequence_length
    return count(program.traced.jaxpr, batch), tokens, program.definition


@pytest.mark.parametrize("scan", [True, False])
def test_a_training_step_is_six_a_weight_and_the_attention_formula(scan):
    result, tokens, definition = counted(config(scan_layers=scan))
    model = training_flops_per_token(definition, 128) * tokens
    assert result.total() == pytest.approx(model, rel=1e-6)


def test_full_remat_runs_every_layer_once_more():
    plain, tokens, _ = counted(config())
    again, _, _ = counted(config(remat="full"))
    weights = 3 * (4 * 64 * 64 + 3 * 64 * 256)  # of 3 layers: attention, and ffn as configured
    more = again.total() - plain.total()
    assert more > 0
    assert more <= 2 * tokens * (weights + 2 * 128 * 64 * 3)
    assert np.isclose(again.saved_bytes, 3 * tokens * 64 * 4)
