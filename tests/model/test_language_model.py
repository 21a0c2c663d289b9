"""The model as a whole: embeddings, logits, state, masks and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import masks
from efficient_lm.config import layer
from efficient_lm.model.language_model import _sum_losses
from tests.model.tiny import loss_and_gradient, run, tiny

TOKENS = jnp.asarray(np.random.default_rng(0).integers(32, size=(2, 9)), jnp.int32)


def test_logits_are_hidden_times_unembedding():
    for tied in (True, False):
        definition, arrays = tiny(tie_embeddings=tied)
        assert ("head" in arrays) is not tied
        output = run(definition, arrays, TOKENS)
        table = arrays["embedding" if tied else "head"]
        expected = np.asarray(output.hidden) @ np.asarray(table).T
        np.testing.assert_allclose(output.logits, expected, rtol=1e-4, atol=1e-4)
        assert output.logits.dtype == jnp.float32 and output.state is None
        model = definition.bind(arrays)
        np.testing.assert_array_equal(model.unembedding(), table)
        assert model(TOKENS, logits=False).logits is None


def test_the_embedding_scale_multiplies_embeddings_alone():
    definition, arrays = tiny()
    scaled, _ = tiny(embedding_scale=4.0)
    larger = arrays | {"embedding": 4.0 * arrays["embedding"]}
    np.testing.assert_allclose(
        run(scaled, arrays, TOKENS).hidden, run(definition, larger, TOKENS).hidden, rtol=1e-5
    )


def test_the_soft_cap_bounds_the_logits_and_leaves_small_ones():
    definition, arrays = tiny()
    capped, _ = tiny(logits_soft_cap=3.0)
    logits = np.asarray(run(definition, arrays, TOKENS).logits)
    found = np.asarray(run(capped, arrays, TOKENS).logits)
    assert np.abs(logits).max() > 3.0 > np.abs(found).max()
    np.testing.assert_allclose(found, 3.0 * np.tanh(logits / 3.0), rtol=1e-4, atol=1e-4)


def test_a_window_over_the_whole_sequence_is_full_attention():
    full, arrays = tiny()
    windowed, _ = tiny(layers=(layer(window=9),))
    narrow, _ = tiny(layers=(layer(window=8),))
    expected = run(full, arrays, TOKENS).logits
    np.testing.assert_allclose(run(windowed, arrays, TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    found = run(narrow, arrays, TOKENS).logits
    np.testing.assert_allclose(found[:, :8], expected[:, :8], rtol=1e-5, atol=1e-5)
    assert np.abs(found[:, 8] - expected[:, 8]).max() > 1e-4


def test_another_mask_is_obeyed():
    definition, arrays = tiny(num_layers=1)
    changed = TOKENS.at[:, 3].set((TOKENS[:, 3] + 1) % 32)
    mask = masks.PrefixLM(jnp.array([5, 5], jnp.int32))
    before, after = (run(definition, arrays, t, mask=mask).hidden for t in (TOKENS, changed))
    moved = np.abs(before - after).max(axis=(0, 2)) > 1e-6
    assert moved[:5].all()  # the prefix sees itself in both directions
    causal = [run(definition, arrays, t).hidden for t in (TOKENS, changed)]
    assert not (np.abs(causal[0] - causal[1]).max(axis=(0, 2))[:3] > 0).any()


def test_positions_default_to_the_running_index():
    definition, arrays = tiny()
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))
    given = run(definition, arrays, TOKENS, positions=positions).logits
    np.testing.assert_allclose(run(definition, arrays, TOKENS).logits, given, rtol=1e-6)
    stretched = run(definition, arrays, TOKENS, positions=3 * positions).logits
    assert np.abs(stretched - given).max() > 1e-3


def test_the_state_counts_tokens_and_not_padding():
    definition, arrays = tiny()
    state = definition.bind(arrays).init_state(2, 16)
    np.testing.assert_array_equal(state["length"], [0, 0])
    segments = jnp.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 4 + [0] * 5], jnp.int32)
    state = run(definition, arrays, TOKENS, segment_ids=segments, state=state).state
    np.testing.assert_array_equal(state["length"], [7, 4])
    nothing = jnp.zeros((2, 1), jnp.int32)
    after = run(definition, arrays, TOKENS[:, :1], segment_ids=nothing, state=state).state
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_rings_hold_no_more_than_their_window():
    definition, arrays = tiny(layers=(layer(window=4), layer()), num_layers=5)
    period, rest = definition.bind(arrays).init_state(3, 32)["layers"]
    assert period[0]["key"].shape == (2, 3, 2, 4, 8)  # [layers, B, heads, slots, head dim]
    assert period[1]["key"].shape == (2, 3, 2, 32, 8)
    assert rest[0]["key"].shape == (3, 2, 4, 8)


def test_a_bf16_model_stays_close_to_fp32_and_keeps_fp32_gradients():
    definition, arrays = tiny()
    half, _ = tiny(dtype="bfloat16")
    output = run(half, arrays, TOKENS)
    assert output.hidden.dtype == jnp.bfloat16 and output.logits.dtype == jnp.float32
    expected = np.asarray(run(definition, arrays, TOKENS).logits)
    error = np.linalg.norm(output.logits - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 0.02
    _, gradient = loss_and_gradient(half, arrays, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_auxiliary_losses_are_summed_over_layers_by_name():
    aux = (({"ffn": {"balance_loss": jnp.array([1.0, 2.0]), "load": jnp.ones(3)}},),
           ({"ffn": {"balance_loss": jnp.array(4.0)}},))  # fmt: skip
    assert _sum_losses(aux) == {"balance_loss": 7.0}
    definition, arrays = tiny()
    assert set(run(definition, arrays, TOKENS).aux) == {"layers"}


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_norm_placement(placement):
    definition, arrays = tiny(num_layers=1, norm_placement=placement)
    model = definition.bind(arrays)
    residual = model.stack.rest[0].ffn_residual
    rng = np.random.default_rng(1)
    x, branch = (jnp.asarray(rng.normal(size=(1, 3, 16)), jnp.float32) for _ in range(2))
    norms = {"pre": ["norm_in"], "post": ["norm_out"], "sandwich": ["norm_in", "norm_out"]}
    for name in ("norm_in", "norm_out"):
        assert hasattr(residual, name) == (name in norms[placement])
    entered, left = residual.enter(x), residual.leave(x, branch, None)
    if placement == "pre":
        expected = residual.norm_in(x), x + branch
    elif placement == "post":
        expected = x, residual.norm_out(x + branch)
    else:
        expected = residual.norm_in(x), x + residual.norm_out(branch)
    np.testing.assert_allclose(entered, expected[0], rtol=1e-6)
    np.testing.assert_allclose(left, expected[1], rtol=1e-6)
    assert np.isfinite(run(definition, arrays, TOKENS).logits).all()


def test_a_layer_without_feed_forward_has_no_parameters_for_it():
    definition, arrays = tiny(layers=(layer(ffn="none"),), num_layers=1)
    assert set(definition.parameters["stack"]["rest"]["0"]) == {"mixer", "mixer_residual"}
    assert np.isfinite(run(definition, arrays, TOKENS).logits).all()
