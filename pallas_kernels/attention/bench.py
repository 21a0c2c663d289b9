"""What `python -m pallas_kernels.bench --op=attention` measures: ours and the peers."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._core.dispatch import Choice
from pallas_kernels._core.timing import Pass, loop
from pallas_kernels.attention import attention, explain, ref
from pallas_kernels.attention.cases import CASES, Case

__all__ = ["CASES", "choice", "contestants", "expected", "passes"]

DECODE_STEPS = 100  # a decode step is shorter than a launch
REFERENCE_BYTES = 2**32  # of fp32 scores a row, up to which the reference fits beside the rest


def contestants(case: Case) -> dict:
    """{name: function of (q, k, v)} for our implementations, "auto" and those of jax.nn."""
    mask = case.mask
    ours = {
        f"ours:{name}": functools.partial(attention, mask=mask, implementation=name)
        for name in ("auto", "cudnn", "splash", "xla")
    }
    options = {"is_causal": not case.decode}  # a decoding query sees every slot of the cache
    if case.window is not None:
        options["local_window_size"] = (case.window - 1, 0)
    if case.segments:
        options["mask"] = mask.dense(case.T, case.S)[:, None]
    peers = {
        f"jax.nn:{name}": functools.partial(
            jax.nn.dot_product_attention, implementation=name, **options
        )
        for name in ("xla", "cudnn")
    }
    return ours | peers


def choice(case: Case) -> Choice:
    """What "auto" takes for the case here."""
    return explain(*case.inputs()[:3], mask=case.mask)


def passes(case: Case, function) -> dict[str, Pass]:
    """Forward, and forward with backward unless decoding, of one contestant."""
    q, k, v, cotangent = case.inputs()
    forward = jax.jit(function)
    if case.decode:
        timed = loop(function, DECODE_STEPS)
        return {"forward": Pass(timed, (q, k, v), case.flops, case.bytes, forward, DECODE_STEPS)}

    @jax.jit
    def both(q, k, v, cotangent):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(cotangent)

    # Backward: five products to the forward's two (Dao et al. 2022), so 3.5 forwards in all.
    return {
        "forward": Pass(forward, (q, k, v), case.flops, case.bytes, forward),
        "forward_backward": Pass(both, (q, k, v, cotangent), 3.5 * case.flops, 0, both),
    }


def expected(case: Case) -> dict:
    """{pass: fp32 arrays of the reference} of the first row of the batch; {} if too large."""
    if 4 * case.N * case.T * case.S > REFERENCE_BYTES:
        return {}
    q, k, v, cotangent = (array[:1].astype(jnp.float32) for array in case.inputs())
    mask = jax.tree.map(lambda array: array[:1], case.mask)
    run = functools.partial(ref.attention, mask=mask, scale=case.H**-0.5)
    out = jax.jit(run)(q, k, v)
    if case.decode:
        return {"forward": (out,)}
    gradients = jax.jit(lambda *a: jax.vjp(run, *a[:3])[1](a[3]))(q, k, v, cotangent)
    return {"forward": (out,), "forward_backward": (out, *gradients)}
