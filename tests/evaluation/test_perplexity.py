"""Evaluation against a naive computation, whatever the batch size, stride or devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import DataConfig
from efficient_lm.data.pipeline import make_evaluation_batches
from efficient_lm.data.tokenizers import ByteTokenizer
from efficient_lm.errors import DataError
from efficient_lm.evaluation.perplexity import evaluate_batches, make_scorer
from efficient_lm.inference.load import load
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.parallel.placement import place_batch

TEXT = "def f(x):\n    return x + 1  # é\n" * 9
LENGTH = 32


@pytest.fixture(scope="module")
def model(workdir):
    return load(workdir)[0]


@pytest.fixture(scope="module")
def scored(model, run_config, tmp_path_factory):
    """scored(devices=1, **options of make_evaluation_batches) -> metrics."""
    path = tmp_path_factory.mktemp("data") / "text.py"
    path.write_text(TEXT)
    data = DataConfig(
        source="text", paths=(str(path),), valid_paths=(str(path),), sequence_length=LENGTH
    )

    @functools.cache
    def scorer(devices):
        mesh = make_mesh(run_config.parallel, jax.devices()[:devices])
        step = jax.jit(make_scorer(run_config, model.definition, mesh, ByteTokenizer.byte_lengths))
        return mesh, step

    def run(devices=1, **options):
        mesh, step = scorer(devices)
        arrays = jax.device_put(model.arrays, jax.sharding.NamedSharding(mesh, jax.P()))
        batches = make_evaluation_batches(data, ByteTokenizer(), "valid", **options)
        return evaluate_batches(lambda batch: step(arrays, place_batch(batch, mesh)), batches)

    return run


@pytest.fixture(scope="module")
def naive(model):
    """{stride: (loss of each token but the first, in nats; its place in the window)}."""
    tokens = ByteTokenizer().encode(TEXT)

    def losses(stride):
        result, places, end = [], [], 0
        for start in range(0, len(tokens) - 1, stride):
            window = tokens[start : start + LENGTH + 1]
            padded = np.zeros((1, LENGTH), np.int32)
            padded[0, : len(window) - 1] = window[:-1]
            logits = np.asarray(model(padded).logits[0, : len(window) - 1], np.float64)
            lse = np.log(np.exp(logits).sum(axis=-1))
            all_losses = lse - logits[np.arange(len(window) - 1), window[1:]]
            new = start + len(all_losses) - end  # labels that no window before has scored
            if new > 0:
                result.extend(all_losses[-new:])
                places.extend(range(len(all_losses) - new, len(all_losses)))
                end = start + len(all_losses)
        assert len(result) == len(tokens) - 1
        return np.array(result), np.array(places)

    return losses


@pytest.mark.parametrize(("stride", "batch_size"), [(LENGTH, 4), (8, 4), (8, 3)])
def test_every_token_is_scored_once_with_the_context_of_its_window(
    scored, naive, stride, batch_size
):
    metrics = scored(stride=stride, batch_size=batch_size)
    losses, places = naive(stride)
    assert metrics["tokens"] == metrics["bytes"] == len(TEXT.encode()) - 1
    assert metrics["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert metrics["bits_per_byte"] == pytest.approx(losses.mean() / math.log(2), rel=1e-5)
    for place, loss in enumerate(metrics["position_loss"]):
        assert loss == pytest.approx(losses[places == place].mean(), rel=1e-4)


def test_devices_change_nothing(scored):
    one, many = scored(batch_size=8), scored(devices=8, batch_size=8)
    for name in ("loss", "accuracy", "tokens", "position_loss"):
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5)


def test_accuracy_is_that_of_the_argmax(model, scored):
    tokens = ByteTokenizer().encode(TEXT)
    right = total = 0
    for start in range(0, len(tokens) - 1, LENGTH):
        window = tokens[start : start + LENGTH + 1]
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(window) - 1] = window[:-1]
        guesses = np.argmax(model(padded).logits[0], axis=-1)[: len(window) - 1]
        right, total = right + int((guesses == window[1:]).sum()), total + len(window) - 1
    assert scored(batch_size=4)["accuracy"] == pytest.approx(right / total, rel=1e-6)


def test_no_array_of_all_logits_is_alive(run_config, model):
    """The compiled scorer at a small chunk has no buffer of [B, T, V] fp32."""
    from dataclasses import replace

    small = replace(run_config, objective=replace(run_config.objective, chunk_logits=1024))
    mesh = make_mesh(small.parallel, jax.devices()[:1])
    batch = {name: jax.ShapeDtypeStruct((64, LENGTH), jnp.int32)
             for name in ("tokens", "labels", "segment_ids", "positions")}  # fmt: skip
    batch["weights"] = jax.ShapeDtypeStruct((64, LENGTH), jnp.float32)

    def temporary(config):
        scorer = jax.jit(make_scorer(config, model.definition, mesh, ByteTokenizer.byte_lengths))
        return scorer.lower(model.arrays, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary(small) < 64 * LENGTH * 256 * 4 <= temporary(run_config)


def test_sums_that_training_returns_are_enough_and_nothing_to_score_is_said():
    rows = [{"loss_sum": 2.0, "weight_sum": 4.0, "correct_sum": 1.0, "bytes_sum": 0.0}] * 5
    metrics = evaluate_batches(lambda batch: batch, rows)
    assert metrics["loss"] == 0.5 and metrics["accuracy"] == 0.25 and metrics["tokens"] == 20
    assert metrics["bits_per_byte"] is None and "position_loss" not in metrics
    for none in ([], [rows[0] | {"weight_sum": 0.0}]):
        with pytest.raises(DataError, match="no token to score"):
            evaluate_batches(lambda batch: batch, none)
