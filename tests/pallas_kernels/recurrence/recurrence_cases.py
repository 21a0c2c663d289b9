"""Inputs of the recurrent ops that are hard in some way, and errors of value and gradients."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels._core.testing import relative_error


@dataclass(frozen=True)
class Case:
    """Sizes as in `pallas_kernels._core.recurrence`.

    decay: "none", "scalar" or "vector"; log_decay: its values are this times a uniform number, or
    this itself with `constant`. cosine: about that of any two keys. segments: ids of every row.
    """

    B: int = 2
    T: int = 40
    H: int = 2
    N: int = 2
    K: int = 8
    V: int = 12
    decay: str = "scalar"
    log_decay: float = -0.3
    constant: bool = False
    cosine: float = 0.0
    beta: float | None = None
    initial_state: bool = False
    segments: tuple[int, ...] | None = None
    dtype: str = "float32"

    def arguments(self, seed: int = 0) -> dict:
        """q, k, v, g, beta, initial_state; keys of norm 1; None for what the case has not."""
        keys = iter(jax.random.split(jax.random.key(seed), 8))
        B, T, H, N, K, V = self.B, self.T, self.H, self.N, self.K, self.V
        dtype = jnp.dtype(self.dtype)
        q = jax.random.normal(next(keys), (B, T, H, K))
        own = _unit(jax.random.normal(next(keys), (B, T, H, K)))
        common = _unit(jax.random.normal(next(keys), (1, 1, H, K)))
        k = _unit(self.cosine**0.5 * common + (1 - self.cosine) ** 0.5 * own)
        v = jax.random.normal(next(keys), (B, T, N, V))
        g = None
        if self.decay != "none":
            shape = (B, T, N) if self.decay == "scalar" else (B, T, N, K)
            uniform = jax.random.uniform(next(keys), shape)
            g = self.log_decay * (jnp.ones(shape) if self.constant else uniform)
        beta = jax.nn.sigmoid(jax.random.normal(next(keys), (B, T, N)))
        if self.beta is not None:
            beta = jnp.full_like(beta, self.beta)
        state = jax.random.normal(next(keys), (B, N, K, V)) if self.initial_state else None
        return {
            "q": q.astype(dtype), "k": k.astype(dtype), "v": v.astype(dtype), "g": g, "beta": beta,
            "initial_state": state,
        }  # fmt: skip

    @property
    def segment_ids(self):
        """[B, T], or None."""
        if self.segments is None:
            return None
        return jnp.broadcast_to(jnp.array(self.segments, jnp.int32)[None], (self.B, self.T))


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def lengths(*segments: tuple[int, int]) -> tuple[int, ...]:
    """Segment ids from (id, length) pairs: lengths((1, 2), (0, 1)) = (1, 1, 0)."""
    return tuple(number for number, length in segments for _ in range(length))


# Rows of 40 tokens; chunks of 16 then end inside.
CASES = {
    "scalar": Case(),
    "none": Case(decay="none"),
    "vector": Case(decay="vector"),
    "grouped": Case(B=1, H=2, N=6, initial_state=True),
    "grouped_vector": Case(B=1, H=1, N=3, decay="vector", initial_state=True),
    "one_token": Case(T=1, initial_state=True),
    "one_token_vector": Case(T=1, decay="vector"),
    "odd": Case(T=37, initial_state=True),
    "shorter_than_a_chunk": Case(T=5, decay="vector", initial_state=True),
    # In full chunks: its d_g of 1e-9 would drown in the rounding of padded ones.
    "forgets_at_once": Case(T=32, log_decay=-20.0, constant=True, initial_state=True),
    "forgets_at_once_vector": Case(decay="vector", log_decay=-20.0, initial_state=True),
    "below_the_least_exponent": Case(log_decay=-100.0, constant=True),
    "below_the_least_exponent_vector": Case(decay="vector", log_decay=-100.0, constant=True),
    "hardly_forgets": Case(log_decay=-1e-5, initial_state=True),
    "hardly_forgets_vector": Case(decay="vector", log_decay=-1e-5, initial_state=True),
    "equal_keys": Case(cosine=0.999, beta=0.95, log_decay=-1e-3),
    "equal_keys_no_decay": Case(cosine=0.999, beta=0.95, decay="none"),
    "packed": Case(segments=lengths((1, 7), (2, 20), (1, 13)), initial_state=True),
    "packed_vector": Case(
        decay="vector", segments=lengths((1, 7), (2, 20), (1, 13)), initial_state=True
    ),
    "packed_none": Case(decay="none", segments=lengths((3, 16), (2, 1), (4, 23))),
    "padded": Case(segments=lengths((0, 5), (1, 12), (0, 3), (1, 4), (2, 6), (0, 10))),
    "padded_with_state": Case(
        segments=lengths((0, 19), (1, 3), (2, 1), (3, 1), (0, 16)), initial_state=True
    ),
    "all_padding": Case(segments=lengths((0, 40)), initial_state=True),
}

# What the Hopper kernels have to tell apart, at sizes that they take. Chunks of 64, in pairs; of
# linear attention, rows of "packed" and "no_decay" run in two pieces.
HOPPER_CASES = {
    "one_token": Case(B=8, T=1, K=64, V=64, initial_state=True, dtype="bfloat16"),
    "packed": Case(
        T=197, H=1, N=3, K=64, V=128, initial_state=True, dtype="bfloat16",
        segments=lengths((0, 5), (1, 90), (0, 10), (2, 7), (3, 70), (0, 15)),
    ),
    "no_decay": Case(T=197, K=128, V=64, decay="none", dtype="bfloat16"),
    "two_tiles_a_processor": Case(
        B=4, T=150, H=4, N=16, K=128, V=128, initial_state=True, dtype="bfloat16"
    ),
    "ten_chunks": Case(B=8, T=630, H=3, N=9, K=128, V=128, initial_state=True, dtype="bfloat16"),
    "one_token_vector": Case(
        B=8, T=1, K=64, V=64, decay="vector", initial_state=True, dtype="bfloat16"
    ),
    "packed_vector": Case(
        T=197, H=1, N=3, K=64, V=128, decay="vector", initial_state=True, dtype="bfloat16",
        segments=lengths((0, 5), (1, 90), (0, 10), (2, 7), (3, 70), (0, 15)),
    ),
    "forgets_at_once_vector": Case(
        T=197, K=128, V=64, decay="vector", log_decay=-20.0, dtype="bfloat16"
    ),
    "ten_chunks_vector": Case(
        B=4, T=630, H=8, N=16, K=128, V=128, decay="vector", initial_state=True, dtype="bfloat16"
    ),
}  # fmt: skip
# For GPUs alone.
HOPPER_LONG = {
    decay: Case(
        B=1, T=65_536, K=128, V=128, decay=decay, log_decay=-0.02, initial_state=True,
        dtype="bfloat16",
    )
    for decay in ("scalar", "vector")
}  # fmt: skip
HOPPER_OPS = ("gated_delta_rule", "gated_linear_attention")
HOPPER_RUNS, HOPPER_LONG_RUNS = (
    [
        (op, name)
        for op in HOPPER_OPS
        for name, case in cases.items()
        if op == "gated_delta_rule" or case.decay != "vector"
    ]
    for cases in (HOPPER_CASES, HOPPER_LONG)
)


def hopper_arguments(op: str, name: str) -> dict:
    """Of a case; what stands in padding is large, and must not show."""
    case = (HOPPER_CASES | HOPPER_LONG)[name]
    arguments = case.arguments()
    if op == "gated_linear_attention":
        del arguments["beta"]
    if case.segments is not None:
        padding = (case.segment_ids == 0)[:, :, None, None]
        for x in ("k", "v"):
            arguments[x] = jnp.where(padding, 10 * arguments[x], arguments[x])
    return arguments


def errors(reference, function, arguments: dict, upcast: bool = True) -> dict:
    """Relative errors of o, final state and each gradient, from cotangents of both results.

    The functions take the arguments by name and return (o, final state). Arguments that are None
    are passed on and have no gradient. upcast: the reference gets all inputs in fp32.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    wide = {name: value.astype(jnp.float32) for name, value in given.items()}
    expected = _results(reference, wide if upcast else given, arguments)
    actual = _results(function, given, arguments)
    return {name: relative_error(actual[name], expected[name]) for name in expected}


def _results(function, given: dict, arguments: dict) -> dict:
    def outputs(given):
        return dict(zip(("o", "final_state"), function(**(arguments | given)), strict=True))

    @jax.jit
    def run(given):
        out, pull = jax.vjp(outputs, given)
        keys = dict(zip(out, jax.random.split(jax.random.key(7)), strict=True))
        # Of bf16, so that those of a bf16 output and of its fp32 reference are the same.
        cotangents = {
            name: jax.random.normal(keys[name], out[name].shape, "bfloat16") for name in out
        }
        (gradients,) = pull({name: x.astype(out[name].dtype) for name, x in cotangents.items()})
        return out | {f"d_{name}": value for name, value in gradients.items()}

    return run(given)
