"""Tokens/s of decoding behind a context, and the bytes of the state."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import shapes
from flax import nnx

from efficient_lm.config import Config, ModelConfig
from efficient_lm.inference.decode import CHUNK, Carry, Request
from efficient_lm.inference.engine import bucket
from efficient_lm.inference.model import Model
from efficient_lm.inference.sampling import Sampling
from efficient_lm.model.definition import define

PROMPT = 16  # tokens that the programs are compiled for; the state is drawn instead


def make_model(config: ModelConfig) -> Model:
    """Random weights in the dtype of the model, drawn on the device, every layer apart."""
    definition = define(config, scan=False)
    draw = jax.jit(
        lambda key, shape: 0.02 * jax.random.normal(key, shape, config.dtype), static_argnums=1
    )
    keys = iter(jax.random.split(jax.random.key(0), 10_000))
    arrays = jax.tree.map(
        lambda leaf: draw(next(keys), leaf.shape) if leaf.inputs or len(leaf.shape) > 1
        else jnp.ones(leaf.shape, jnp.float32),
        definition.parameters,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )  # fmt: skip
    return Model(definition, arrays)


def filled_carry(model: Model, batch: int, context: int, slots: int) -> Carry:
    """The state behind `context` tokens of every row: random, caches filled up to there."""

    def make(key):
        state = model.definition.bind(model.arrays).init_state(batch, slots)

        def fill(path, leaf):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                return 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
            if path[-1].key == "index":
                slot = jnp.arange(slots, dtype=jnp.int32)
                return jnp.broadcast_to(jnp.where(slot < context, slot, -1)[None], leaf.shape)
            return jnp.ones_like(leaf)

        layers = jax.tree_util.tree_map_with_path(fill, state["layers"])
        length = jnp.full((batch,), context, jnp.int32)
        zeros = jnp.zeros((batch,), jnp.int32)
        return Carry({"length": length, "layers": layers}, zeros, jnp.ones((), jnp.int32))

    return jax.jit(make)(jax.random.key(1))


def rows(
    shape: shapes.Shape, contexts: list[int], mixers: list[str], chunks: int
) -> Iterator[dict[str, Any]]:
    """A row for each mixer and context: `shape.rows` sequences, `chunks` dispatches of CHUNK."""
    for mixer in mixers:
        longest = replace(shape, length=bucket(max(contexts) + chunks * CHUNK))
        config = Config.from_dict({"model": shapes.model_fields(longest, mixer)})
        model = make_model(config.model)
        for context in contexts:
            row = {"what": "decode", "mixer": mixer, "context": context, "batch": shape.rows}
            try:
                yield row | measure(model, config, shape.rows, context, chunks)
            except Exception as error:
                yield row | {"error": f"{type(error).__name__}: {error}"[:300]}


def measure(model: Model, config: Config, batch: int, context: int, chunks: int) -> dict[str, Any]:
    """Seconds a step of all rows, the best of three runs, and the bytes of one row's state."""
    slots = bucket(context + chunks * CHUNK)
    request = Request(
        keys=jax.random.split(jax.random.key(2), batch),
        limits=jnp.full((batch,), 2**30, jnp.int32),
        stop_tokens=jnp.zeros((0,), jnp.int32),
        sampling=Sampling(temperature=0).checked(),
    )
    _, decode, _ = model.programs.generation(
        model.arrays, np.zeros((batch, PROMPT), np.int32), request, slots
    )
    none = np.zeros((batch,), bool)

    def run(dispatches: int) -> float:
        carry = jax.block_until_ready(filled_carry(model, batch, context, slots))
        began = time.perf_counter()
        for _ in range(dispatches):
            carry, _, tokens = decode(model.arrays, carry, none, np.int32(CHUNK), request)
        jax.block_until_ready(tokens)
        return (time.perf_counter() - began) / (CHUNK * dispatches)

    run(1)
    seconds = min(run(chunks) for _ in range(3))
    return {
        "step_milliseconds": 1e3 * seconds,
        "tokens_per_second": batch / seconds,
        "state_bytes": shapes.state_bytes(config, slots),
        "weight_bytes": sum(x.nbytes for x in jax.tree.leaves(model.arrays)),
    }
