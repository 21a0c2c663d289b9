"""The one place for differences between JAX versions, and for what JAX knows of the device."""

import os
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Target:
    """The device that the code being traced will run on.

    platform: "cpu", "gpu" or "tpu". kind: the vendor's name, such as "NVIDIA H200" or "TPU v5e".
    compute_capability: of an NVIDIA GPU, such as 9.0; else None.
    """

    platform: str
    kind: str
    compute_capability: float | None = None


def target() -> Target:
    """The device of the abstract mesh in use, if one names it, else the first default device.

    The mesh lets a program be compiled ahead of time for a device that this host lacks.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        platform = "gpu" if abstract.platform in ("cuda", "rocm") else abstract.platform
        return Target(platform, abstract.device_kind, _capability(platform, abstract.device_kind))
    device = jax.config.jax_default_device
    if device is None:
        device = jax.devices()[0]
    elif isinstance(device, str):
        device = jax.devices(device)[0]
    capability = getattr(device, "compute_capability", None)
    return Target(device.platform, device.device_kind, float(capability) if capability else None)


def _capability(platform: str, kind: str) -> float | None:
    """Compute capability of an NVIDIA GPU that is known by name alone."""
    known = {"A100": 8.0, "L40": 8.9, "H100": 9.0, "H200": 9.0, "B200": 10.0, "GB200": 10.0}
    return next((known[name] for name in known if platform == "gpu" and name in kind), None)


def splash_attention():
    """JAX's TPU splash attention package; its place in the tree is not a public promise."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention


def tpu_devices(topology: str, slices: int = 1) -> list:
    """The devices of a TPU topology such as "v5e:2x2", which nobody need own, to compile for.

    slices: how many of them a data-center network joins.
    """
    from jax.experimental import topologies

    # Several test processes may compile at once; libtpu reads this when it is loaded.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    several = {"num_slices": slices} if slices > 1 else {}
    description = topologies.get_topology_desc(topology_name=topology, platform="tpu", **several)
    return list(description.devices)
