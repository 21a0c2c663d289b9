"""How long compilers work on a program."""

import os

import jax

LEVEL = "xla_backend_optimization_level"


def compiler_options(shardings=None) -> dict[str, int] | None:
    """Of `jax.jit` for a program on the devices of `shardings` (a pytree; None: the default ones).

    On CPUs LLVM's second level of optimization instead of the third: the same numbers, sooner
    compiled. XLA_FLAGS that name a level are heeded.
    """
    places = jax.tree.leaves(shardings)
    platform = next(iter(places[0].device_set)).platform if places else jax.default_backend()
    if platform != "cpu" or LEVEL in os.environ.get("XLA_FLAGS", ""):
        return None
    return {LEVEL: 2}
