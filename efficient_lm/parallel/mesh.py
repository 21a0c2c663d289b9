"""The device mesh of a run."""

import math

import jax
import numpy as np
from jax.sharding import Mesh

from efficient_lm.config import ParallelConfig
from efficient_lm.errors import ConfigError

AXES = ("data", "fsdp")


def make_mesh(config: ParallelConfig, devices: list | None = None) -> Mesh:
    """Mesh over all devices (or those given) with the axis sizes of `config`, -1 filled in.

    ConfigError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    given = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if -1 in sizes.values():
        if len(devices) % fixed:
            raise ConfigError(
                f"config.parallel ({given}) cannot divide {len(devices)} devices; "
                f"{fixed} must be a divisor of {len(devices)}"
            )
        sizes = {a: len(devices) // fixed if size == -1 else size for a, size in sizes.items()}
    elif fixed != len(devices):
        raise ConfigError(
            f"config.parallel ({given}) asks for {fixed} devices, but there are {len(devices)}; "
            "set one axis to -1 to take the rest"
        )
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES)
