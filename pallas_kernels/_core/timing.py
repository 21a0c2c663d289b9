"""Honest timing of jitted functions, and the roofs of the device they are held against."""

import functools
import importlib.metadata
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._core import compat


@dataclass(frozen=True)
class Pass:
    """One thing to time: `function(*arguments)` does `calls` times the work of `compared`.

    flops and bytes: of one call (bytes 0: not stated). compared: jitted, its results are held
    against the reference.
    """

    function: Callable
    arguments: tuple
    flops: float
    bytes: int
    compared: Callable
    calls: int = 1


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over the repeats."""

    median: float
    minimum: float
    repeats: int
    calls: int  # in one repeat, between two clock readings


def measure(function: Callable, *arguments, repeats: int = 10, seconds: float = 0.05) -> Timing:
    """Time a jitted `function`: as many calls a repeat as fill `seconds`, then wait for the device.

    Launches are asynchronous, so that the host's overhead hides behind the device's work unless
    the work is shorter than a launch; use `loop` for such functions.
    """
    jax.block_until_ready(function(*arguments))  # compile
    begin = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = max(1, min(1000, round(seconds / max(time.perf_counter() - begin, 1e-6))))
    samples = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        samples.append(1e3 * (time.perf_counter() - begin) / calls)
    return Timing(float(np.median(samples)), min(samples), repeats, calls)


def loop(function: Callable, steps: int) -> Callable:
    """A jitted function that runs `function` `steps` times on the device, for work below a launch.

    Each pass feeds a zero of the last result into the first argument, so that none is skipped.
    """

    def run(first, *rest):
        def step(_, first):
            leaf = jax.tree.leaves(function(first, *rest))[0]
            zero = jnp.where(jnp.isnan(leaf.ravel()[0]), 1.0, 0.0)  # the compiler cannot know it
            return first + zero.astype(first.dtype)

        return jax.lax.fori_loop(0, steps, step, first)

    return jax.jit(run)


@dataclass(frozen=True)
class Roofs:
    """What the device was measured to do."""

    bf16_tflops: float  # dense matmul, fp32 accumulation
    fp32_tflops: float  # at the default matmul precision
    copy_gb_per_second: float  # bytes read plus bytes written


def measure_roofs() -> Roofs:
    """Dense matmuls and a large copy on the default device."""
    elements = 2**24 if compat.target().platform == "cpu" else 2**28
    array = jnp.ones((elements,), jnp.float32)
    copy = jax.jit(lambda array: array + 1.0)
    rate = 2 * array.nbytes / measure(copy, array).minimum / 1e6
    return Roofs(matmul_flops("bfloat16") / 1e12, matmul_flops("float32") / 1e12, rate)


@functools.cache
def matmul_flops(dtype: str) -> float:
    """FLOP/s of a large square matrix product on the default device, at the default precision."""
    size = 1024 if compat.target().platform == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    multiply = jax.jit(lambda a, b: a @ b)
    return 2e3 * size**3 / measure(multiply, a, a, repeats=5).minimum


def environment() -> dict:
    """Device, host and versions, to be kept beside every number."""
    versions = {
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "numpy", "tokamax", "libtpu")
        if any(importlib.metadata.distributions(name=name))
    }
    device = jax.devices()[0]
    return {
        "device": asdict(compat.target()),
        "device_count": jax.device_count(),
        "runtime": device.client.platform_version.splitlines()[0],
        "host": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
    }
