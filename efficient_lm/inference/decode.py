"""Prefill and decode on the device: pure functions with explicit state, compiled ahead of time."""

import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from efficient_lm.compilation import compiler_options
from efficient_lm.inference.sampling import Sampling, sample
from efficient_lm.model.definition import ModelDefinition
from efficient_lm.model.language_model import Output

# Decode steps that one dispatch can take: its overhead is shared by that many tokens.
CHUNK = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Request:
    """What stays the same through one generation: a pytree of arrays.

    keys: PRNG keys [B]. limits: int32 [B], tokens each row may generate. stop_tokens: int32 [n],
    ids that finish a row. allowed: bool [V], ids that may be drawn; None: all.
    """

    keys: Any
    limits: Any
    stop_tokens: Any
    sampling: Sampling
    allowed: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Carry:
    """What a step changes; a pytree that is donated, so that caches are written in place.

    state: of the model. token: int32 [B], the last one of each row, not yet in `state`. count:
    int32, tokens generated so far by every row that has not finished.
    """

    state: Any
    token: Any
    count: Any


def prefill(
    definition: ModelDefinition,
    arrays: dict[str, Any],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    request: Request,
    *,
    slots: int,
) -> tuple[Carry, Bool[Array, "B"]]:
    """(carry with the first generated token, finished) after right-padded prompts.

    lengths: tokens of each prompt. slots: tokens the caches can hold.
    """
    model = definition.bind(arrays)
    inside = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    output = model(
        tokens,
        segment_ids=inside.astype(jnp.int32),
        state=model.init_state(tokens.shape[0], slots),
        fresh=True,
        logits=False,
    )
    last = jnp.take_along_axis(output.hidden, (lengths - 1)[:, None, None], axis=1)
    count = jnp.zeros((), jnp.int32)
    token, finished = _next(model.logits(last)[:, 0], count, request)
    return Carry(output.state, token, count + 1), finished


def decode(
    definition: ModelDefinition,
    arrays: dict[str, Any],
    carry: Carry,
    finished: Bool[Array, "B"],
    steps: Int[Array, ""],
    request: Request,
) -> tuple[Carry, Bool[Array, "B"], Int[Array, "B n"]]:
    """Up to `steps` (at most CHUNK) tokens for each row: (carry, finished, tokens).

    The loop ends early when all rows have finished. tokens: [B, CHUNK], -1 where nothing was
    generated; a stop token is the last of its row.
    """
    model = definition.bind(arrays)

    def going(loop):
        index, _, finished, _ = loop
        return (index < steps) & ~jnp.all(finished)

    def step(loop):
        index, carry, finished, tokens = loop
        output = model(carry.token[:, None], state=carry.state)
        token, now = _next(output.logits[:, 0], carry.count, request)
        tokens = tokens.at[:, index].set(jnp.where(finished, -1, token))
        return index + 1, Carry(output.state, token, carry.count + 1), finished | now, tokens

    tokens = jnp.full((carry.token.shape[0], CHUNK), -1, jnp.int32)
    start = (jnp.zeros((), jnp.int32), carry, finished, tokens)
    _, carry, finished, tokens = jax.lax.while_loop(going, step, start)
    return carry, finished, tokens


def _next(
    logits: Float[Array, "B V"], count: Int[Array, ""], request: Request
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """(token, whether it finishes its row) for the token number `count` of each row."""
    if request.allowed is not None:
        logits = jnp.where(request.allowed[None], logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (0, None))(request.keys, count)
    token = sample(logits, keys, request.sampling)
    stops = jnp.any(token[:, None] == request.stop_tokens[None], axis=-1)
    return token, stops | (count + 1 >= request.limits)


class Programs:
    """The compiled functions of one model structure, kept by the shapes they were compiled for."""

    def __init__(self, definition: ModelDefinition):
        self._definition = definition
        self._compiled: dict[Any, Any] = {}
        self.forward = jax.jit(self._forward)

    def _forward(self, arrays, tokens, segment_ids, positions) -> Output:
        return self._definition.bind(arrays)(tokens, segment_ids=segment_ids, positions=positions)

    def generation(
        self, arrays: dict[str, Any], tokens: np.ndarray, request: Request, slots: int
    ) -> tuple[Any, Any, float]:
        """(prefill, decode, seconds spent compiling now) for prompts of the shape of `tokens`.

        prefill(arrays, tokens, lengths, request); decode(arrays, carry, finished, steps, request),
        which takes the buffers of `carry` for its result.
        """
        start = time.perf_counter()
        shapes = jax.tree.map(jax.typeof, (arrays, request))
        leaves, structure = jax.tree.flatten(shapes)
        batch = tokens.shape[0]
        key = (structure, tuple(leaves), slots)
        lengths, finished = (jax.ShapeDtypeStruct((batch,), t) for t in (jnp.int32, bool))
        options = compiler_options()
        first = jax.jit(
            lambda *a: prefill(self._definition, *a, slots=slots), compiler_options=options
        )
        inputs = (arrays, jax.ShapeDtypeStruct(tokens.shape, jnp.int32), lengths, request)
        if (*key, tokens.shape) not in self._compiled:
            self._compiled[*key, tokens.shape] = first.lower(*inputs).compile()
        if (*key, batch) not in self._compiled:
            carry, _ = jax.eval_shape(first, *inputs)
            steps = jax.ShapeDtypeStruct((), jnp.int32)
            # The tokens of a chunk are not donated: the host reads them while the next one runs.
            following = jax.jit(
                lambda *a: decode(self._definition, *a),
                donate_argnums=1,
                compiler_options=options,
            )
            lowered = following.lower(arrays, carry, finished, steps, request)
            self._compiled[*key, batch] = lowered.compile()
        seconds = time.perf_counter() - start
        return self._compiled[*key, tokens.shape], self._compiled[*key, batch], seconds
