"""The device mesh of a run."""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from efficient_lm.config import MESH_AXES, ParallelConfig
from efficient_lm.errors import ConfigError


def make_mesh(config: ParallelConfig, devices: list | None = None) -> Mesh:
    """Mesh over all devices (or those given) with the axis sizes of `config`, -1 filled in.

    TPU devices are placed so that the inner axes have the shortest links. Where devices belong
    to several slices, `dcn` must be their number.

    ConfigError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    shape = tuple(sizes.values())
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        if config.dcn != len(slices):
            raise ConfigError(
                f"config.parallel.dcn={config.dcn}, but the devices are in {len(slices)} slices; "
                f"set it to {len(slices)}"
            )
        inside, between = (1, *shape[1:]), (config.dcn,) + (1,) * (len(shape) - 1)
        array = mesh_utils.create_hybrid_device_mesh(
            inside, between, devices, allow_split_physical_axes=True
        )
    elif devices[0].platform == "tpu":
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        array = np.asarray(devices).reshape(shape)
    return Mesh(array, MESH_AXES)


def axis_sizes(config: ParallelConfig, devices: int) -> dict[str, int]:
    """Size of each mesh axis over so many devices; ConfigError when they do not multiply to it."""
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    given = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
    if -1 in sizes.values():
        if devices % fixed:
            raise ConfigError(
                f"config.parallel ({given}) cannot divide {devices} devices; "
                f"{fixed} must be a divisor of {devices}"
            )
        return {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
    if fixed != devices:
        raise ConfigError(
            f"config.parallel ({given}) asks for {fixed} devices, but there are {devices}; "
            "set one axis to -1 to take the rest"
        )
    return sizes
