"""Short trainings as pure functions of arrays, the seed and the learning rate among them: one
program serves all of these, and `jax.vmap` of it trains them together."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from efficient_lm.config import Config
from efficient_lm.model.definition import define
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.training.optimizer import make_optimizer
from efficient_lm.training.state import TrainState, make_initializer
from efficient_lm.training.step import make_evaluation_step, make_train_step


class Programs(NamedTuple):
    """What a training is made of."""

    begin: Callable[[Any], TrainState]  # of the seed
    advance: Callable  # (state, learning rate, batches [steps, B, T]) -> (state, losses [steps])
    evaluate: Callable  # (state, batch) -> sums
    parameters: int

    def compile(self, rate, stack, batch, members: int | None = None) -> "Programs":
        """Compiled for arguments of these shapes; `advance` takes the buffers of its state.

        members: None, or how many seeds and rates, then arrays, train together on the same batches.
        """
        seed, advance, evaluate = np.int32(0), self.advance, self.evaluate
        state = jax.eval_shape(self.begin, seed)
        begin = start = jax.jit(self.begin).lower(seed).compile()
        options = {}
        if members is not None:
            # XLA would try out fusions of these small arrays for minutes, to save seconds.
            options = {"xla_gpu_autotune_level": 0}
            advance, evaluate = jax.vmap(advance, (0, 0, None)), jax.vmap(evaluate, (0, None))
            state = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((members, *x.shape), x.dtype), state
            )

            def begin(seeds):
                # Not by vmap: XLA takes long to compile draws for several seeds at once.
                return jax.tree.map(lambda *leaves: np.stack(leaves), *map(start, seeds))

        advance = jax.jit(advance, donate_argnums=0).lower(state, rate, stack).compile(options)
        evaluate = jax.jit(evaluate).lower(state, batch).compile(options)
        return Programs(begin, advance, evaluate, self.parameters)


def make_programs(config: Config) -> Programs:
    """The programs of a config, whose learning rate must be 1: it is multiplied by that given."""
    if config.optimizer.learning_rate != 1.0 or config.training.log_every != 1:
        raise ValueError("the config must have a learning rate of 1 and log every step")
    mesh = make_mesh(config.parallel, jax.devices()[:1])
    definition = define(config.model)
    lengths = np.ones(config.model.vocabulary_size, np.int32)
    evaluation_step = make_evaluation_step(config, definition, mesh, lengths)

    def make(rate):
        whole = make_optimizer(config.optimizer, definition.parameters, config.training.steps)
        return optax.chain(whole, optax.scale(rate))

    def begin(seed):
        seeded = dataclasses.replace(config.training, seed=seed)
        seeded = dataclasses.replace(config, training=seeded)
        return make_initializer(seeded, definition, make(1.0))()

    def advance(state, rate, batches):
        step = make_train_step(config, definition, make(rate), mesh, lengths)
        state, metrics = jax.lax.scan(step, state, batches)
        return state, metrics["loss_sum"] / metrics["weight_sum"]

    def evaluate(state, batch):
        return evaluation_step(state.parameters, batch)

    return Programs(begin, advance, evaluate, definition.count())
