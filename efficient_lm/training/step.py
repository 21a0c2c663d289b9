"""One training step and one evaluation step: pure functions of pytrees."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from efficient_lm import registry
from efficient_lm.compilation import compiler_options
from efficient_lm.config import Config
from efficient_lm.model.definition import ModelDefinition
from efficient_lm.parallel.mixing import use_mesh
from efficient_lm.training.optimizer import learning_rate, update_ema
from efficient_lm.training.state import SUMS, TrainState

Batch = dict[str, Array]


def make_loss(
    config: Config, definition: ModelDefinition, mesh: Mesh, byte_lengths: np.ndarray
) -> Callable:
    """loss(parameters, batch, key) -> (loss, sums that add up); key None: no dropout.

    bytes_sum: bytes of text that the weighted labels stand for, from `byte_lengths` [V].
    """
    objective = registry.objective(config.objective.name)(config.objective)
    table = np.zeros(config.model.vocabulary_size, np.float32)
    table[: len(byte_lengths)] = byte_lengths
    # Rows of one document without padding before its end need no segments under a causal mask,
    # and attention without them is the faster kernel.
    data = config.data
    one_segment = data.packing == "concat_then_split" and not data.mask_across_documents

    def loss(parameters: Any, batch: Batch, key: jax.Array | None):
        model = definition.bind(parameters)
        use_mesh(model, mesh, config.parallel)
        seen = {n: x for n, x in batch.items() if not (one_segment and n == "segment_ids")}
        value, metrics = objective(model, seen, key)
        label_bytes = jnp.take(jnp.asarray(table), batch["labels"])
        metrics["bytes_sum"] = jnp.sum(label_bytes * batch["weights"])
        return value, {name: metrics[name] for name in SUMS}

    return loss


def make_train_step(
    config: Config,
    definition: ModelDefinition,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    byte_lengths: np.ndarray,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """train_step(state, batch) -> (state, metrics), to be compiled by `jit_train_step`.

    A batch whose loss or gradient is not finite changes nothing but the counts of skipped
    updates. Metrics hold the sums since the last logged step, this step's included.
    """
    loss = make_loss(config, definition, mesh, byte_lengths)
    microbatches = config.optimizer.accumulation_steps
    rate = learning_rate(config.optimizer, config.training.steps)
    decay = config.optimizer.ema_decay

    def gradients(parameters, batch, key):
        return jax.value_and_grad(loss, has_aux=True)(parameters, batch, key)

    def accumulated(parameters, batch, key):
        """Gradients of the mean over the whole batch, one microbatch alive at a time."""

        def one(carry, scanned):
            (value, sums), gradient = gradients(parameters, *scanned)
            weight = sums["weight_sum"]
            new = (value * weight, jax.tree.map(lambda g: g.astype(jnp.float32) * weight, gradient))
            return jax.tree.map(jnp.add, carry, (*new, sums)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), parameters)
        start = (jnp.zeros(()), zeros, {name: jnp.zeros(()) for name in SUMS})
        # Rows i, i + n, ...: a split that leaves every row on its device.
        split = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(-1, microbatches, *x.shape[1:]), 0, 1), batch
        )
        keys = None if key is None else jax.random.split(key, microbatches)
        (value, gradient, sums), _ = jax.lax.scan(one, start, (split, keys))
        weight = jnp.maximum(sums["weight_sum"], 1.0)
        return (value / weight, sums), jax.tree.map(lambda g: g / weight, gradient)

    def train_step(state: TrainState, batch: Batch):
        key = None
        if config.model.dropout > 0:
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        compute = gradients if microbatches == 1 else accumulated
        (value, sums), gradient = compute(state.parameters, batch, key)
        norm = optax.tree.norm(gradient)
        # Once the run of non-finite steps is too long, nothing changes any more until the host,
        # which looks at metrics later, stops the run.
        limit = config.training.max_nonfinite_steps
        halted = state.skipped_in_a_row >= limit
        finite = jnp.isfinite(value) & jnp.isfinite(norm) & ~halted

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        updates, new_optimizer = optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = keep(optax.apply_updates(state.parameters, updates), state.parameters)
        average = state.average
        if average is not None:
            average = keep(update_ema(average, parameters, decay, state.step), average)
        restart = (state.step % config.training.log_every) == 0
        sums = {
            name: jnp.where(restart, 0.0, state.sums[name]) + jnp.where(finite, sums[name], 0.0)
            for name in SUMS
        }
        skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            parameters=parameters,
            optimizer=keep(new_optimizer, state.optimizer),
            average=average,
            sums=sums,
            skipped=state.skipped + jnp.where(halted, 0, skipped),
            skipped_in_a_row=jnp.where(halted, limit, (state.skipped_in_a_row + 1) * skipped),
            key=state.key,
        )
        metrics = sums | {
            "gradient_norm": norm,
            "learning_rate": rate(state.step),
            "skipped": new_state.skipped,
            "skipped_in_a_row": new_state.skipped_in_a_row,
        }
        return new_state, metrics

    return train_step


def jit_train_step(train_step: Callable, state: TrainState) -> Callable:
    """`train_step` under jit, the state donated and left where `state` (may be abstract) lies."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    # Else the compiler may leave small parameters in other places than the step takes them.
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiler_options(shardings),
    )


def make_evaluation_step(
    config: Config, definition: ModelDefinition, mesh: Mesh, byte_lengths: np.ndarray
) -> Callable[[Any, Batch], dict[str, Float[Array, ""]]]:
    """evaluation_step(parameters, batch) -> sums, without dropout."""
    loss = make_loss(config, definition, mesh, byte_lengths)
    return lambda parameters, batch: loss(parameters, batch, None)[1]
