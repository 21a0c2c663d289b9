"""Tokens/s of the fast weights alone, one chunk after the other and all at once."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
from models import Layer

from efficient_lm.evaluation.results import attempt_prepared
from efficient_lm.mixers import fast_weights
from efficient_lm.mixers.fast_weight_rows import read_rows
from efficient_lm.mixers.fast_weights import Chunk, Rule
from efficient_lm.mixers.ttt import LADDER, ladder
from pallas_kernels._core.timing import measure


def rows(size: Layer, repeats: int, at_once: int) -> Iterator[dict]:
    """A row for each step of the ladder, form, and direction: the best of `repeats` times.

    `at_once` programs compile at the same time.
    """
    jobs = []
    for step in LADDER:
        rule = Rule(**ladder(step))
        arguments = draw(rule, size)
        for form in ("sequential", "parallel") if rule.is_linear else ("sequential",):
            for what in ("forward", "forward and backward"):
                function = partial(read if what == "forward" else gradient, rule, form, size)
                row = {"part": "speed", "method": step, "form": form, "what": what}
                jobs.append((row, partial(prepare, function, arguments, size, repeats)))
    return attempt_prepared(jobs, at_once)


def read(rule: Rule, form: str, size: Layer, initial, query, chunk):
    """What the queries of a row read."""
    start = fast_weights.nothing_learned(rule, initial, size.B)
    return read_rows(rule, form, size.C, initial, start, query, chunk)


def gradient(rule: Rule, form: str, size: Layer, *arrays):
    """Of the sum of all that is read, by each array."""
    total = lambda *arrays: jnp.sum(read(rule, form, size, *arrays).astype(jnp.float32))  # noqa: E731
    return jax.grad(total, argnums=(0, 1, 2))(*arrays)


def prepare(function, arguments: tuple, size: Layer, repeats: int) -> Callable[[], dict]:
    """Compile the function for these arguments; what times it."""
    program = jax.jit(function).lower(*arguments).compile()

    def timed() -> dict:
        timing = measure(program, *arguments, repeats=repeats)
        return {
            "milliseconds": round(timing.minimum, 3),
            "tokens_per_second": round(1e3 * size.B * size.T / timing.minimum),
        }

    return timed


def draw(rule: Rule, size: Layer):
    """(initial weights, queries, keys and values with their rates) of norm-one keys."""
    keys = iter(jax.random.split(jax.random.key(0), 10))
    tokens = (size.B, size.T, size.N)

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    names = ["last"] if rule.features == "identity" else ["last", "in", "gate"]
    initial = {name: normal(size.N, size.D, size.D) * size.D**-0.5 for name in names}
    query, key = (normal(*tokens, size.D) * size.D**-0.5 for _ in range(2))
    rates = 3 if rule.update == "all" else 1
    chunk = Chunk(
        key.astype(size.dtype),
        normal(*tokens, size.D).astype(size.dtype),
        jnp.full((*tokens, rates), 1e-3) if rule.learned_rate else None,
        jnp.full(tokens, 0.5) if rule.momentum else None,
    )
    return initial, query.astype(size.dtype), chunk
