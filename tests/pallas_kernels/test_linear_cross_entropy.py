"""The chunked loss against its specification, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_kernels.linear_cross_entropy import (
    explain,
    linear_cross_entropy,
    linear_cross_entropy_per_token,
    xla,
)
from pallas_kernels.linear_cross_entropy.cases import TESTS

METHODS = ("xla_rows", "xla_vocabulary")


def inputs(rng, rows, features, vocabulary, dtype=jnp.float32, scale=1.0):
    """hidden [M, D], weight [V, D], labels [M], weights [M] with some zeros."""
    hidden = jnp.asarray(scale * rng.normal(size=(rows, features)), dtype)
    weight = jnp.asarray(rng.normal(size=(vocabulary, features)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, vocabulary, rows), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 3, rows), jnp.float32)
    return hidden, weight, labels, weights


def loss_and_gradients(hidden, weight, labels, weights, **options):
    """((total, sums), (dhidden, dweight))."""

    def total(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, weights=weights, **options)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(hidden, weight)


def assert_close(actual, expected, rtol=1e-5, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), actual, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TESTS)
def test_equals_the_specification(rng, method, name):
    case = TESTS[name]
    arrays = inputs(rng, case.rows, case.features, case.vocabulary)
    options = {"soft_cap": case.soft_cap, "z_loss": case.z_loss}
    expected = loss_and_gradients(*arrays, implementation="ref", **options)
    actual = loss_and_gradients(
        *arrays, implementation=method, chunk_logits=case.chunk_logits, **options
    )
    assert_close(actual, expected)


def test_the_specification_is_optax_and_its_parts_add_up(rng):
    hidden, weight, labels, weights = inputs(rng, 9, 8, 21)
    total, sums = linear_cross_entropy(
        hidden, weight, labels, weights=weights, z_loss=1e-2, implementation="ref"
    )
    logits = hidden @ weight.T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    lse = jax.nn.logsumexp(logits, axis=-1)
    np.testing.assert_allclose(sums["loss_sum"], jnp.sum(losses * weights), rtol=1e-6)
    np.testing.assert_allclose(sums["z_loss_sum"], 1e-2 * jnp.sum(lse**2 * weights), rtol=1e-6)
    np.testing.assert_allclose(total, sums["loss_sum"] + sums["z_loss_sum"], rtol=1e-6)
    assert sums["weight_sum"] == jnp.sum(weights)
    assert sums["correct_sum"] == jnp.sum(weights[jnp.argmax(logits, axis=-1) == labels])


@pytest.mark.parametrize("method", METHODS)
def test_gradients_by_finite_differences(rng, method):
    hidden, weight, labels, weights = inputs(rng, 7, 5, 11)
    direction = jnp.asarray(rng.normal(size=weight.shape), jnp.float32)

    def total(step):
        return linear_cross_entropy(
            hidden, weight + step * direction, labels, weights=weights, soft_cap=4.0,
            z_loss=1e-2, chunk_logits=20, implementation=method,
        )[0]  # fmt: skip

    slope = jax.jit(jax.grad(total))(0.0)
    numeric = (total(1e-2) - total(-1e-2)) / 2e-2
    np.testing.assert_allclose(slope, numeric, rtol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_hidden_with_float32_weight(rng, method):
    arrays = inputs(rng, 33, 16, 50, jnp.bfloat16)
    expected = loss_and_gradients(*arrays, implementation="ref")
    (total, sums), (dhidden, dweight) = loss_and_gradients(
        *arrays, implementation=method, chunk_logits=300
    )
    assert (dhidden.dtype, dweight.dtype) == (jnp.bfloat16, jnp.float32)
    assert all(x.dtype == jnp.float32 for x in (total, *sums.values()))
    np.testing.assert_allclose(sums["loss_sum"], expected[0][1]["loss_sum"], rtol=5e-3)
    for actual, reference in zip((dhidden, dweight), expected[1], strict=True):
        actual, reference = (np.asarray(x, np.float32) for x in (actual, reference))
        error = np.linalg.norm(actual - reference) / np.linalg.norm(reference)
        assert error < 8e-3, error


@pytest.mark.parametrize("method", METHODS)
def test_upstream_cotangent_scales_both_gradients(rng, method):
    """The gradients of rows are made before the cotangent is known."""
    hidden, weight, labels, weights = inputs(rng, 10, 8, 21)

    def mean(hidden, weight):
        total, sums = linear_cross_entropy(
            hidden, weight, labels, weights=weights, chunk_logits=50, implementation=method
        )
        return 3.0 * total / sums["weight_sum"] + sums["loss_sum"] * 1e3  # sums: no gradient

    actual = jax.grad(mean, argnums=(0, 1))(hidden, weight)
    expected = loss_and_gradients(hidden, weight, labels, weights, implementation="ref")[1]
    factor = 3.0 / jnp.sum(weights)
    assert_close(actual, jax.tree.map(lambda g: g * factor, expected))


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_weight_zero_change_nothing_whatever_their_label(rng, method):
    hidden, weight, labels, _ = inputs(rng, 12, 8, 21)
    kept = jnp.arange(12) < 7
    weights = kept.astype(jnp.float32)
    labels = jnp.where(kept, labels, jnp.asarray([-1, -100, 21, 10**6] * 3, jnp.int32))
    actual = loss_and_gradients(
        hidden, weight, labels, weights, implementation=method, chunk_logits=50, z_loss=1e-3
    )
    expected = loss_and_gradients(
        hidden[:7], weight, labels[:7], weights[:7], implementation="ref", z_loss=1e-3
    )
    assert_close(actual[0], expected[0])
    assert_close(actual[1][0][:7], expected[1][0])
    assert not np.any(actual[1][0][7:])
    assert_close(actual[1][1], expected[1][1])


@pytest.mark.parametrize("method", METHODS)
def test_large_logits_stay_finite(rng, method):
    arrays = inputs(rng, 8, 8, 21, scale=1e4)
    actual = loss_and_gradients(*arrays, implementation=method, chunk_logits=40)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(actual))
    expected = loss_and_gradients(*arrays, implementation="ref")
    assert_close(actual, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_agree_bit_for_bit(rng, method):
    arrays = inputs(rng, 33, 16, 50)
    runs = [loss_and_gradients(*arrays, implementation=method, chunk_logits=300) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *runs)


def test_per_token_losses_add_up_to_the_total(rng):
    hidden, weight, labels, weights = inputs(rng, 24, 8, 37)
    hidden, labels, weights = (x.reshape(4, 6, *x.shape[1:]) for x in (hidden, labels, weights))
    losses, correct = linear_cross_entropy_per_token(
        hidden, weight, labels, soft_cap=4.0, chunk_logits=100
    )
    assert losses.shape == correct.shape == labels.shape
    _, sums = linear_cross_entropy(
        hidden, weight, labels, weights=weights, soft_cap=4.0, implementation="ref"
    )
    np.testing.assert_allclose(jnp.sum(losses * weights), sums["loss_sum"], rtol=1e-6)
    assert jnp.sum(correct * weights) == sums["correct_sum"]


def compile_loss(method, rows, features, vocabulary, chunk_logits, *, gradients=True):
    def total(hidden, weight, labels):
        return linear_cross_entropy(
            hidden, weight, labels, chunk_logits=chunk_logits, implementation=method
        )[0]

    function = jax.value_and_grad(total, argnums=(0, 1)) if gradients else total
    shapes = (
        jax.ShapeDtypeStruct((rows, features), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, features), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    return jax.jit(function).lower(*shapes).compile()


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_the_vocabulary(method):
    rows, features, chunk = 2048, 8, 2**20
    beyond_weight = {}
    for vocabulary in (8192, 65536):
        compiled = compile_loss(method, rows, features, vocabulary, chunk)
        temporary = compiled.memory_analysis().temp_size_in_bytes
        # By rows, the weight gradient is carried while it is summed, beside the output.
        weight_bytes = 4 * vocabulary * features if method == "xla_rows" else 0
        beyond_weight[vocabulary] = temporary - weight_bytes
    small, large = beyond_weight.values()
    assert large < 1.03 * small, beyond_weight
    assert large < 1.1 * 4 * chunk, beyond_weight  # one chunk; all logits are 512 MiB


def flops(compiled):
    return compiled.cost_analysis()["flops"]


def test_evaluation_does_not_pay_for_gradients():
    arguments = ("xla_rows", 256, 64, 512, 2**24)
    products = 2 * 256 * 64 * 512
    assert flops(compile_loss(*arguments, gradients=False)) < 1.3 * products
    assert 2.9 * products < flops(compile_loss(*arguments)) < 3.3 * products


def test_auto_takes_the_one_with_three_products():
    hidden = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((128256, 4096), jnp.float32)
    assert explain(hidden, weight).name == "xla_rows"
    assert explain(hidden, weight, implementation="xla_vocabulary").name == "xla_vocabulary"


def test_errors_say_what_is_allowed(rng):
    hidden, weight, labels, _ = inputs(rng, 6, 8, 11)
    with pytest.raises(ValueError, match="xla_rows"):
        linear_cross_entropy(hidden, weight, labels, implementation="triton")
    with pytest.raises(ValueError, match="same last dimension"):
        explain(hidden, weight[:, 1:])
    with pytest.raises(ValueError, match="0 rows, chunk_logits=8; both must be at least 1"):
        linear_cross_entropy(hidden[:0], weight, labels[:0], chunk_logits=8)


def test_one_reading_of_the_logits_gives_their_maximum_and_sum(rng):
    logits = jnp.asarray(30 * rng.standard_normal((3, 5, 1021)), jnp.float32)
    logits = logits.at[0, 0, 1:].set(-jnp.inf)
    highest, total = xla._highest_and_total(logits)
    np.testing.assert_array_equal(highest, jnp.max(logits, axis=-1))
    expected = jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
