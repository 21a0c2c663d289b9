"""What the benchmarks of the recurrent ops share: shapes, inputs, passes, and the reference."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._core.timing import Pass

REFERENCE_BYTES = 2**33  # of fp32 states of a row's tokens, that the reference's backward keeps


@dataclass(frozen=True)
class Case:
    """Sizes as in `_core.recurrence`. delta: with the delta rule, and so with beta.

    decay: "none", "scalar", "vector", or "retention", a scalar that is the same at every token,
    1 - 2 ** (-5 - head) (arXiv 2307.08621).
    """

    name: str
    B: int
    T: int
    H: int
    N: int
    K: int
    V: int
    decay: str = "scalar"
    dtype: str = "bfloat16"
    tags: tuple[str, ...] = ()
    delta: bool = False

    @property
    def flops(self) -> float:
        """Of the recurrence: two products of a token with the state [K, V] of a value head.

        The delta rule has three; its chunks of C tokens do C (3 K + 2 V) + C^2 / 3 more a token and
        head: at C = 64 and K = V = 128 half as much again.
        """
        return 2.0 * (2 + self.delta) * self.B * self.T * self.N * self.K * self.V

    @property
    def bytes(self) -> int:
        """Of the inputs and the output, each touched once."""
        gates = {"none": 0, "vector": self.N * self.K}.get(self.decay, self.N)
        values = 2 * self.H * self.K + 2 * self.N * self.V
        itemsize = jnp.dtype(self.dtype).itemsize
        return self.B * self.T * (itemsize * values + 4 * (gates + self.delta * self.N))

    def inputs(self) -> tuple[tuple[Float[Array, "B T *features"] | None, ...], Array]:
        """(q, k, v, g, with the delta rule beta) and a cotangent of the output [B, T, N, V].

        Normal, keys of norm 1, g uniform from 0 to -0.2, beta the sigmoid of a normal number.
        """
        keys = jax.random.split(jax.random.key(0), 6)
        tokens, dtype = (self.B, self.T), jnp.dtype(self.dtype)
        q, k = (jax.random.normal(key, (*tokens, self.H, self.K)) for key in keys[:2])
        k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
        v, cotangent = (jax.random.normal(key, (*tokens, self.N, self.V)) for key in keys[2:4])
        g = None
        if self.decay == "retention":
            per_head = jnp.log1p(-(2.0 ** (-5 - jnp.arange(self.N, dtype=jnp.float32))))
            g = jnp.broadcast_to(per_head, (*tokens, self.N))
        elif self.decay != "none":
            features = (self.K,) if self.decay == "vector" else ()
            g = -0.2 * jax.random.uniform(keys[5], (*tokens, self.N, *features))
        arguments = (q.astype(dtype), k.astype(dtype), v.astype(dtype), g)
        if self.delta:
            arguments += (jax.nn.sigmoid(jax.random.normal(keys[4], (*tokens, self.N))),)
        return arguments, cotangent.astype(dtype)


def contestants(op: Callable, case: Case) -> dict[str, Callable]:
    """{name: function of the case's arguments} for our implementations of the public `op`."""

    def ours(implementation):
        return lambda *arguments: op(*arguments, implementation=implementation)[0]

    return {f"ours:{name}": ours(name) for name in ("auto", "mosaic_gpu", "mosaic_tpu", "xla")}


def passes(case: Case, function: Callable) -> dict[str, Pass]:
    """Forward, and forward with the gradients of all arguments, of one contestant."""
    arguments, cotangent = case.inputs()
    forward = jax.jit(function)

    @jax.jit
    def both(arguments, cotangent):
        out, pull = jax.vjp(function, *arguments)
        return out, pull(cotangent)

    # Backward: for each of the forward's products, two for the gradients of its operands.
    return {
        "forward": Pass(forward, arguments, case.flops, case.bytes, forward),
        "forward_backward": Pass(both, (arguments, cotangent), 3 * case.flops, 0, both),
    }


def expected(reference: Callable, case: Case) -> dict:
    """{pass: fp32 arrays of `reference`} of the first row of the batch, as far as they fit."""
    arguments, cotangent = jax.tree.map(lambda x: x[:1].astype(jnp.float32), case.inputs())

    def run(*arguments):
        return reference(*arguments, scale=case.K**-0.5, initial_state=None, documents=None)[0]

    results = {"forward": (jax.jit(run)(*arguments),)}
    if 4 * case.T * case.N * case.K * case.V <= REFERENCE_BYTES:
        both = jax.jit(lambda *a: (run(*a), jax.vjp(run, *a)[1](cotangent)))
        results["forward_backward"] = both(*arguments)
    return results
