"""The next-token objective on a tiny model of the language model's interface."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_lm import registry
from efficient_lm.config import ObjectiveConfig
from efficient_lm.model.context import all_tokens
from efficient_lm.objectives.autoregressive import autoregressive


class Bigram(nnx.Module):
    """hidden = embedding of the token; records what it is called with."""

    def __init__(self, soft_cap=None, aux=None):
        draws = np.random.default_rng(0)
        self.embedding = nnx.Param(jnp.asarray(draws.normal(size=(13, 8)), jnp.float32))
        self.config = SimpleNamespace(logits_soft_cap=soft_cap)
        self.over_tokens = all_tokens
        self.aux = aux or {}
        self.called_with = nnx.static({})

    def __call__(self, tokens, *, segment_ids, positions, dropout_key, logits):
        self.called_with.update(
            segment_ids=segment_ids, positions=positions, dropout_key=dropout_key, logits=logits
        )
        hidden = jnp.tanh(self.embedding[...][tokens])
        return SimpleNamespace(
            hidden=hidden, logits=None, state=None, aux=jax.tree.map(jnp.float32, self.aux)
        )

    def unembedding(self):
        return self.embedding[...]


@pytest.fixture
def batch(rng):
    """Four rows of six tokens; the last two labels of each row do not count."""
    tokens, labels = (rng.integers(0, 13, (4, 6)).astype(np.int32) for _ in range(2))
    weights = np.ones((4, 6), np.float32)
    weights[:, 4:] = 0
    segments = np.ones((4, 6), np.int32)
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), (4, 6))
    return jax.tree.map(
        jnp.asarray,
        {"tokens": tokens, "labels": labels, "weights": weights, "segment_ids": segments,
         "positions": positions},
    )  # fmt: skip


def plain_losses(model, batch, soft_cap=None):
    hidden = model(
        batch["tokens"], segment_ids=None, positions=None, dropout_key=None, logits=False
    ).hidden
    logits = hidden @ model.unembedding().T
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]), logits


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("chunk_logits", [1, 60, 2**24])
def test_loss_is_the_weighted_mean(batch, soft_cap, chunk_logits):
    model = Bigram(soft_cap)
    loss, metrics = autoregressive(ObjectiveConfig(chunk_logits=chunk_logits))(model, batch, None)
    losses, logits = plain_losses(model, batch, soft_cap)
    expected = jnp.sum(losses * batch["weights"]) / 16
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_sum"], 16 * expected, rtol=1e-5)
    assert metrics["weight_sum"] == 16
    right = (jnp.argmax(logits, axis=-1) == batch["labels"]).astype(jnp.float32)
    assert metrics["correct_sum"] == jnp.sum(right * batch["weights"])


def test_gradient_equals_that_of_the_plain_loss(batch):
    graph, parameters = nnx.split(Bigram(), nnx.Param)

    def ours(parameters):
        model = nnx.merge(graph, parameters)
        return autoregressive(ObjectiveConfig(chunk_logits=40))(model, batch, None)[0]

    def plain(parameters):
        losses, _ = plain_losses(nnx.merge(graph, parameters), batch)
        return jnp.sum(losses * batch["weights"]) / 16

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        jax.grad(ours)(parameters),
        jax.grad(plain)(parameters),
    )


def test_labels_that_do_not_count_change_nothing(batch):
    objective = autoregressive(ObjectiveConfig(z_loss=1e-3))
    loss, metrics = objective(Bigram(), batch, None)
    other = batch | {"labels": jnp.where(batch["weights"] > 0, batch["labels"], -1)}
    assert objective(Bigram(), other, None)[0] == loss
    nothing = batch | {"weights": jnp.zeros_like(batch["weights"])}
    loss, metrics = objective(Bigram(), nothing, None)
    assert (loss, metrics["weight_sum"]) == (0, 0)


def test_metrics_add_up_over_microbatches(batch):
    objective = autoregressive(ObjectiveConfig(z_loss=1e-3))
    loss, whole = objective(Bigram(), batch, None)
    halves = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(0, 1), slice(1, 4))]
    parts = [objective(Bigram(), half, None)[1] for half in halves]
    summed = jax.tree.map(jnp.add, *parts)
    for name, value in whole.items():
        np.testing.assert_allclose(summed[name], value, rtol=1e-6)
    total = summed["loss_sum"] + summed["z_loss_sum"]
    np.testing.assert_allclose(total / summed["weight_sum"], loss, rtol=1e-6)


def test_z_loss_and_auxiliary_losses_are_added_and_reported(batch):
    plain, _ = autoregressive(ObjectiveConfig())(Bigram(), batch, None)
    model = Bigram(aux={"balance_loss": 0.25, "tokens_per_expert": 7.0})
    loss, metrics = autoregressive(ObjectiveConfig(z_loss=1e-2))(model, batch, None)
    assert metrics["z_loss_sum"] > 0
    np.testing.assert_allclose(loss, plain + metrics["z_loss_sum"] / 16 + 0.25, rtol=1e-6)
    assert metrics["balance_loss_sum"] == 0.25 * 16
    assert "tokens_per_expert_sum" not in metrics


def test_the_model_gets_segments_positions_and_key_and_makes_no_logits(batch, key):
    model = Bigram()
    autoregressive(ObjectiveConfig())(model, batch, key)
    assert model.called_with["segment_ids"] is batch["segment_ids"]
    assert model.called_with["positions"] is batch["positions"]
    assert model.called_with["dropout_key"] is key
    assert model.called_with["logits"] is False


def test_it_is_registered():
    assert registry.objective("autoregressive") is autoregressive
