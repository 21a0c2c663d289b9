"""Helpers to test kernels: errors in the right norm, poisoned buffers, compilation for TPUs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._core import compat

TPU_TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def relative_error(actual, expected) -> float:
    """Norm of the difference over the norm of `expected` (absolute where that is 0), in float64."""
    actual = np.asarray(actual, np.float64)
    expected = np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {actual.shape} and {expected.shape}")
    if not np.isfinite(actual).all():
        return float("inf")
    return float(np.linalg.norm(actual - expected) / (np.linalg.norm(expected) or 1.0))


def value_and_gradients(function: Callable, arguments: dict, cotangent) -> dict:
    """{"out": ..., "d_<name>": ...}: `function(**arguments)` and its vector-Jacobian product.

    None arguments are passed on and have no gradient.
    """
    given = {name: value for name, value in arguments.items() if value is not None}

    @jax.jit
    def run(given, cotangent):
        out, pull = jax.vjp(lambda given: function(**(arguments | given)), given)
        (gradients,) = pull(cotangent.astype(out.dtype))
        return {"out": out} | {f"d_{name}": value for name, value in gradients.items()}

    return run(given, cotangent)


def errors_against(reference: Callable, function: Callable, arguments: dict, cotangent) -> dict:
    """Relative errors of the value and of each gradient; `reference` gets the inputs in fp32."""
    upcast = {
        name: None if value is None else value.astype(jnp.float32)
        for name, value in arguments.items()
    }
    expected = value_and_gradients(reference, upcast, cotangent)
    actual = value_and_gradients(function, arguments, cotangent)
    return {name: relative_error(actual[name], expected[name]) for name in expected}


def poisoned_interpret_params():
    """Interpret mode of a TPU kernel whose unwritten memory is NaN and whose races are found."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(
        uninitialized_memory="nan", detect_races=True, out_of_bounds_reads="raise"
    )


def compile_for_tpu(topology: str, function: Callable, *shapes, **keywords):
    """Compile `function` for one chip of `topology` on a host without TPUs (needs libtpu).

    shapes: pytrees of jax.ShapeDtypeStruct. Real Mosaic compilation: kernels that exceed VMEM
    fail here. "auto" dispatch inside sees the TPU. Returns the jax.stages.Compiled.
    """
    mesh = jax.sharding.Mesh(np.array(compat.tpu_devices(topology)[:1]), ("device",))
    one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=one), shapes
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, **keywords).lower(*shapes).compile()
