"""Chips by their data sheets, and the slices of them that a program can be compiled for."""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax

from efficient_lm.errors import ConfigError
from efficient_lm.training.flops import data_sheet_flops
from pallas_kernels._core.compat import tpu_devices
from pallas_kernels._core.timing import matmul_flops

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What one JAX *device* can do; None where it is not known.

    memory: bytes that a program can use. flops: dense bf16 FLOP/s. memory_bandwidth: bytes/s.
    link_bandwidth: bytes/s one way, over one link of the torus, or from one device into a switch
    (`torus` 0). network: bytes/s to other slices or hosts. devices: JAX devices of a chip, which
    share its links. torus: number of its axes; a chip has two links along each. ring: an axis of
    a multiple of so many chips is closed to a ring. largest: chips of a pod.
    """

    memory: float | int | None
    flops: float
    memory_bandwidth: float | None
    link_bandwidth: float | None
    network: float | None = None
    devices: int = 1
    torus: int = 0
    ring: int = 0
    largest: int = 0
    example: str = ""


# TPUs. FLOP/s, bandwidths: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, read in 2026, where
# "bidirectional ICI bandwidth per chip" is 2 directions times 2 links an axis; DCN is theirs for a
# chip (v5e: 6.4 Tb/s a pod of 256). Memory: "available HBM" as libtpu 0.0.52 says when a program is
# too large for it. Rings: the same pages; 3D slices are tori in multiples of 4 x 4 x 4 chips, 2D
# ones along the whole edge of the 16 x 16 pod. A device of TPU7x is one of a chip's two halves.
CHIPS = {
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 400e9 / 2 / 4, 6.4e12 / 8 / 256,
                torus=2, ring=16, largest=256, example="16x16"),
    "v5p": Chip(95.73 * GIB, 459e12, 2765e9, 1200e9 / 2 / 6, 50e9 / 8,
                torus=3, ring=4, largest=8960, example="8x8x8"),
    "v6e": Chip(31.24 * GIB, 918e12, 1638e9, 800e9 / 2 / 4, 100e9 / 8,
                torus=2, ring=16, largest=256, example="16x16"),
    "tpu7x": Chip(94.74 * GIB, 2307e12 / 2, 7380e9 / 2, 1200e9 / 2 / 6, 100e9 / 8 / 2, devices=2,
                  torus=3, ring=4, largest=9216, example="4x4x4"),
}  # fmt: skip

# GPUs of this host, by a part of their name: bytes, bytes/s of memory, bytes/s one way of NVLink
# (nvidia.com data sheets of H100 SXM and H200: 900 GB/s in both directions).
GPUS = {"H200": (141e9, 4.8e12, 450e9), "H100": (80e9, 3.35e12, 450e9)}


@dataclass(frozen=True)
class Topology:
    """Devices to compile for; `shape`: chips along each axis of the torus, () for this host's."""

    name: str
    chip: Chip
    devices: list[Any]
    shape: tuple[int, ...]

    @property
    def local(self) -> bool:
        """Whether these are the devices of this host."""
        return not self.shape


def find_topology(name: str, slices: int = 1) -> Topology:
    """The topology of a name: "local", or chips by count along each axis, as in "v5p:8x8x8".

    slices: how many such slices are joined by the data-center network (config.parallel.dcn).
    ConfigError, with the known ones, for a name that no one has.
    """
    if name == "local":
        devices = jax.devices()
        return Topology(name, _local_chip(devices[0]), devices, ())
    kind, _, size = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch(r"\d+(x\d+)*", size):
        raise ConfigError(f"unknown topology {name!r}; known: {known_topologies()}")
    shape = tuple(int(n) for n in size.split("x"))
    if len(shape) != chip.torus or not 0 < math.prod(shape) <= chip.largest:
        raise ConfigError(
            f"topology {name!r}: {kind} slices have {chip.torus} axes and at most {chip.largest} "
            f"chips, such as {kind}:{chip.example}"
        )
    try:
        devices = tpu_devices(name, slices)
    except ImportError:
        raise ConfigError(
            f"topology {name!r} needs libtpu, the TPU compiler, which also runs on hosts without "
            "one; install it by: pip install libtpu"
        ) from None
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].rpartition("INVALID_ARGUMENT: ")[2]
        raise ConfigError(f"topology {name!r}: {reason}; such as {kind}:{chip.example}") from None
    return Topology(name if slices == 1 else f"{slices} slices of {name}", chip, devices, shape)


def known_topologies() -> str:
    """A line that lists them."""
    names = [f"{kind}:{'x'.join('ABC'[: chip.torus])} (as {chip.example}; up to {chip.largest})"
             for kind, chip in CHIPS.items()]  # fmt: skip
    return ", ".join(names) + " chips, and local for the devices of this host"


def _local_chip(device: jax.Device) -> Chip:
    """The device of this host, by data sheet or, where none is listed, by a measured product."""
    flops = data_sheet_flops(device) or matmul_flops("bfloat16")
    stats = device.memory_stats() or {}
    memory = stats.get("bytes_limit")
    for part, (size, bandwidth, link) in GPUS.items():
        if part in device.device_kind:
            return Chip(memory or size, flops, bandwidth, link)
    return Chip(memory, flops, None, None)
