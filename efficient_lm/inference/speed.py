"""How long decoding takes behind a context, without a prompt: weights and state are random."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.config import ModelConfig
from efficient_lm.inference.decode import CHUNK, Carry, Request
from efficient_lm.inference.engine import bucket
from efficient_lm.inference.model import Model
from efficient_lm.inference.sampling import Sampling
from efficient_lm.model.definition import define
from efficient_lm.model.language_model import LanguageModel

PROMPT = 16  # tokens that the programs are compiled for; the state is drawn instead


def random_model(config: ModelConfig) -> Model:
    """A model of random weights in its dtype, drawn on the device, every layer apart."""
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


def state_bytes(config: ModelConfig, length: int, name: str | None = None) -> int:
    """Bytes of the decode state of one sequence of up to `length` tokens.

    name: of the leaves that count, such as "memory"; None: all, caches and convolutions included.
    """
    state = jax.eval_shape(
        lambda: LanguageModel(config, nnx.Rngs(0)).init_state(1, length)["layers"]
    )
    return sum(
        leaf.size * leaf.dtype.itemsize
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if name is None or path[-1] == jax.tree_util.DictKey(name)
    )


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


class DecodeTimer:
    """Greedy decoding of `batch` rows behind `context` tokens, compiled for `slots` of cache.

    chunks: dispatches of CHUNK steps that the slots leave room for.
    """

    def __init__(self, model: Model, batch: int, context: int, chunks: int):
        self.model, self.batch, self.context, self.chunks = model, batch, context, chunks
        self.slots = bucket(context + chunks * CHUNK)
        self.request = Request(
            keys=jax.random.split(jax.random.key(2), batch),
            limits=jnp.full((batch,), 2**30, jnp.int32),
            stop_tokens=jnp.zeros((0,), jnp.int32),
            sampling=Sampling(temperature=0).checked(),
        )
        prompts = np.zeros((batch, PROMPT), np.int32)
        _, self.decode, self.compile_seconds = model.programs.generation(
            model.arrays, prompts, self.request, self.slots
        )
        self._seconds(CHUNK, 1)  # so that later runs are warm

    def seconds_a_step(self) -> float:
        """With CHUNK steps a dispatch, none of the host in between: the best of three runs."""
        return min(self._seconds(CHUNK, self.chunks) for _ in range(3))

    def seconds_a_dispatch(self) -> float:
        """With one step a dispatch: the best of two runs."""
        return min(self._seconds(1, CHUNK) for _ in range(2))

    def _seconds(self, steps: int, dispatches: int) -> float:
        arrays, none = self.model.arrays, np.zeros((self.batch,), bool)
        carry = filled_carry(self.model, self.batch, self.context, self.slots)
        jax.block_until_ready(carry)
        began = time.perf_counter()
        for _ in range(dispatches):
            carry, _, tokens = self.decode(arrays, carry, none, np.int32(steps), self.request)
        jax.block_until_ready(tokens)
        return (time.perf_counter() - began) / (steps * dispatches)
