"""How well the fast weights of a trained model fit the chunks that they have just learned from."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efficient_lm.config import Config
from efficient_lm.mixers import fast_weights
from efficient_lm.mixers.ttt import TTT
from efficient_lm.model.context import run_mixer
from efficient_lm.model.definition import define, initialize


def prepare_inner_loss(config: Config, batch: dict) -> Callable[[Any, Sequence[dict]], float]:
    """(parameters, batches) -> L = -<f(k), v>, in the mean of tokens, heads and layers.

    Of each whole chunk, with the weights that its own updates left.
    """
    definition = define(config.model)

    def losses(parameters: Any, tokens: jax.Array) -> jax.Array:
        model = definition.bind(parameters)
        model.mix = watched
        aux = model(tokens, logits=False).aux["layers"]
        return jnp.mean(jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(aux)]))

    shapes = jax.eval_shape(lambda: initialize(definition, jax.random.key(0)))
    program = jax.jit(losses).lower(shapes, batch["tokens"]).compile()
    return lambda parameters, batches: (
        sum(float(program(parameters, batch["tokens"])) for batch in batches) / len(batches)
    )


def watched(mixer: TTT, x: jax.Array, context: Any, state: Any) -> tuple[Any, Any, dict]:
    """The mixer, and beside its output the loss of its chunks."""
    y, state, aux = run_mixer(mixer, x, context, state)
    options, size = mixer.options, mixer.options.chunk_size
    initial, _, tokens = mixer.fast_inputs(mixer.project(x, context))
    count = x.shape[1] // size

    def cut(x):
        x = x[:, : count * size].reshape(x.shape[0], count, size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    def step(learned, chunk):
        weights, momentum = fast_weights.learn(options, initial, *learned, chunk)
        fit = jnp.sum(fast_weights.apply(weights, chunk.key) * chunk.value, axis=-1)
        return (weights, momentum), -jnp.mean(fit.astype(jnp.float32))

    start = fast_weights.nothing_learned(options, initial, x.shape[0])
    weights = {n: jnp.broadcast_to(w[None], (x.shape[0], *w.shape)) for n, w in initial.items()}
    _, losses = jax.lax.scan(step, (weights, start.momentum), jax.tree.map(cut, tokens))
    return y, state, aux | {"inner": jnp.mean(losses)}
