"""Small runs without a work directory, of one process and device, to compare many models."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from efficient_lm.compilation import compiler_options
from efficient_lm.config import Config, ModelConfig
from efficient_lm.data.pipeline import make_evaluation_batches, make_train_iterator
from efficient_lm.data.tokenizers import make_tokenizer
from efficient_lm.evaluation.perplexity import evaluate_batches
from efficient_lm.model.definition import define, initialize
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.training.optimizer import make_optimizer
from efficient_lm.training.state import make_initializer
from efficient_lm.training.step import make_evaluation_step, make_train_step

Batch = dict[str, np.ndarray]
STEPS_AT_ONCE = 20  # in one call of the device, so that small steps do not wait for the host


class Trained(NamedTuple):
    """What came of a run. seconds_a_step: without compilation, the best of its calls."""

    parameters: Any
    losses: list[float]  # of each step
    seconds_a_step: float


def equal_hidden_dim(model: ModelConfig, reference: ModelConfig, multiple: int = 8) -> int:
    """Hidden features with which `model` has as many parameters as `reference`.

    Both have a gated dense feed-forward in every layer. The nearest that differs from what `model`
    has by a multiple of `multiple`.
    """
    missing = define(reference).count() - define(model).count()
    a_feature = 3 * model.embed_dim * model.num_layers
    hidden_dim = model.ffns["dense"]["hidden_dim"]
    return hidden_dim + multiple * round(missing / a_feature / multiple)


def load_batches(config: Config) -> tuple[list[Batch], list[Batch]]:
    """(the training batches of all steps, evaluation batches) of `config`, on the host."""
    tokenizer = make_tokenizer(config.data)
    train = list(
        itertools.islice(make_train_iterator(config.data, tokenizer), config.training.steps)
    )
    limit = config.evaluation.batches
    return train, list(make_evaluation_batches(config.data, tokenizer, limit=limit))


def prepare_training(config: Config, batches: Sequence[Batch]) -> Callable[[], Trained]:
    """Compile a training on these batches, one a step; the function that does it."""
    # So that the sums of each step are its own.
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, log_every=1))
    mesh = make_mesh(config.parallel, jax.devices()[:1])
    definition = define(config.model)
    optimizer = make_optimizer(config.optimizer, definition.parameters, config.training.steps)
    lengths = np.asarray(make_tokenizer(config.data).byte_lengths)
    step = make_train_step(config, definition, optimizer, mesh, lengths)
    initial = make_initializer(config, definition, optimizer)
    begin = jax.jit(initial, compiler_options=compiler_options()).lower().compile()
    advance = jax.jit(lambda state, stacked: jax.lax.scan(step, state, stacked), donate_argnums=0)

    def stack(start: int) -> Batch:
        some = batches[start : start + STEPS_AT_ONCE]
        return {name: np.stack([batch[name] for batch in some]) for name in some[0]}

    starts = range(0, len(batches), STEPS_AT_ONCE)
    programs = {}  # by the number of steps, of which the last call may have fewer
    for start in {starts[0], starts[-1]}:
        stacked = stack(start)
        lowered = advance.lower(jax.eval_shape(initial), stacked)
        programs[len(next(iter(stacked.values())))] = lowered.compile()

    def train() -> Trained:
        state, losses, seconds = begin(), [], []
        for stacked in map(stack, starts):
            steps = len(next(iter(stacked.values())))
            began = time.perf_counter()
            state, metrics = programs[steps](state, stacked)
            found = jax.device_get(metrics)
            seconds.append((time.perf_counter() - began) / steps)
            losses += (found["loss_sum"] / found["weight_sum"]).tolist()
        return Trained(state.parameters, losses, min(seconds))

    return train


def prepare_evaluator(
    config: Config, batch: Batch
) -> Callable[[Any, Iterable[Batch]], dict[str, Any]]:
    """Compile the scoring of a model of `config` on batches like this one.

    Gives evaluate(parameters, batches) -> loss, bits_per_byte and accuracy, as `evaluate_batches`
    has them.
    """
    mesh = make_mesh(config.parallel, jax.devices()[:1])
    definition = define(config.model)
    lengths = np.asarray(make_tokenizer(config.data).byte_lengths)
    step = jax.jit(make_evaluation_step(config, definition, mesh, lengths))
    parameters = jax.eval_shape(lambda: initialize(definition, jax.random.key(0)))
    program = step.lower(parameters, batch).compile()
    return lambda parameters, batches: evaluate_batches(lambda b: program(parameters, b), batches)
