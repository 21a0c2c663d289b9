"""What `python -m pallas_kernels.bench --op=short_convolution` measures: ours and JAX's own."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._core.timing import Pass
from pallas_kernels.short_convolution import explain, ref, short_convolution
from pallas_kernels.short_convolution.cases import CASES, Case
from pallas_kernels.short_convolution.xla import of_norm_one

__all__ = ["CASES", "choice", "contestants", "expected", "passes"]


def contestants(case: Case) -> dict:
    """{name: function of x and weight}: our implementations, and a depthwise convolution of JAX."""

    def ours(implementation):
        return functools.partial(
            short_convolution, silu=True, unit_norm=case.unit_norm, implementation=implementation
        )

    def convolution(x, weight):
        channels = x.shape[2] * x.shape[3]
        kernel = weight.reshape(1, channels, -1).transpose(2, 0, 1).astype(x.dtype)
        y = jax.lax.conv_general_dilated(
            x.reshape(*x.shape[:2], channels), kernel, (1,), [(case.W - 1, 0)],
            dimension_numbers=("NTC", "TIO", "NTC"), feature_group_count=channels,
        )  # fmt: skip
        y = jax.nn.silu(y).reshape(x.shape)
        return of_norm_one(y) if case.unit_norm else y

    own = {f"ours:{name}": ours(name) for name in ("auto", "mosaic_gpu", "xla")}
    return own | {"jax.lax:convolution": convolution}


def choice(case: Case):
    """What "auto" takes for the case here."""
    return explain(*case.inputs()[:2], unit_norm=case.unit_norm)


def passes(case: Case, function) -> dict[str, Pass]:
    """Forward, and forward with the gradients of x and weight, of one contestant."""
    x, weight, cotangent = case.inputs()
    forward = jax.jit(function)

    @jax.jit
    def both(x, weight, cotangent):
        y, pull = jax.vjp(function, x, weight)
        return y, *pull(cotangent)

    # Backward: y again, x's gradient from y's, and the weight's; x, that of y and that of x.
    return {
        "forward": Pass(forward, (x, weight), case.flops, case.bytes, forward),
        "forward_backward": Pass(
            both, (x, weight, cotangent), 4 * case.flops, 5 * case.bytes // 2, both
        ),
    }


def expected(case: Case) -> dict:
    """{pass: fp32 arrays of the reference}: what has rows, of the first alone."""
    x, weight, cotangent = case.inputs()

    def run(x, weight):
        return ref.short_convolution(x, weight, None, None, silu=True, unit_norm=case.unit_norm)

    first = run(x[:1], weight)

    @jax.jit
    def gradients(x, weight, cotangent):
        return jax.vjp(run, x.astype(jnp.float32), weight)[1](cotangent.astype(jnp.float32))

    d_x, d_weight = gradients(x, weight, cotangent)
    return {"forward": (first,), "forward_backward": (first, d_x[:1], d_weight)}
