"""What `python -m pallas_kernels.bench --op=gated_linear_attention` measures: ours."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._core.dispatch import Choice
from pallas_kernels._core.timing import Pass
from pallas_kernels.gated_linear_attention import explain, gated_linear_attention, ref
from pallas_kernels.gated_linear_attention.cases import CASES, Case

__all__ = ["CASES", "choice", "contestants", "expected", "passes"]

REFERENCE_BYTES = 2**34  # of fp32 states of a row's tokens, that the reference's backward keeps


def contestants(case: Case) -> dict:
    """{name: function of (q, k, v, g)} for our implementations."""

    def ours(implementation):
        run = functools.partial(gated_linear_attention, implementation=implementation)
        return lambda *arguments: run(*arguments)[0]

    return {f"ours:{name}": ours(name) for name in ("auto", "mosaic_gpu", "mosaic_tpu", "xla")}


def choice(case: Case) -> Choice:
    """What "auto" takes for the case here."""
    return explain(*case.inputs()[:4])


def passes(case: Case, function) -> dict[str, Pass]:
    """Forward, and forward with the gradients of q, k, v and g, of one contestant."""
    *arguments, cotangent = case.inputs()
    forward = jax.jit(function)

    @jax.jit
    def both(arguments, cotangent):
        out, pull = jax.vjp(function, *arguments)
        return out, pull(cotangent)

    # Backward: for each of the forward's two products, two for the gradients of its operands.
    return {
        "forward": Pass(forward, tuple(arguments), case.flops, case.bytes, forward),
        "forward_backward": Pass(both, (arguments, cotangent), 3 * case.flops, 0, both),
    }


def expected(case: Case) -> dict:
    """{pass: fp32 arrays of the reference} of the first row of the batch; {} if too large."""
    first = lambda x: x if x is None else x[:1].astype(jnp.float32)  # noqa: E731
    *arguments, cotangent = map(first, case.inputs())

    def run(*arguments):
        return ref.gated_linear_attention(
            *arguments, scale=case.K**-0.5, initial_state=None, documents=None
        )[0]

    results = {"forward": (jax.jit(run)(*arguments),)}
    if 4 * case.T * case.N * case.K * case.V <= REFERENCE_BYTES:
        both = jax.jit(lambda *a: (run(*a), jax.vjp(run, *a)[1](cotangent)))
        results["forward_backward"] = both(*arguments)
    return results
