"""Rotary position embedding (arXiv 2104.09864) with Llama-3 and YaRN (arXiv 2309.00071) scaling."""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from efficient_lm.errors import ConfigError


@dataclass(frozen=True)
class RopeConfig:
    """`fraction` of each head is rotated (0: no positions, 1: all); halves are paired as in HF."""

    fraction: float = 1.0
    theta: float = 10_000.0
    scaling: Literal["none", "llama3", "yarn"] = "none"
    factor: float = 1.0  # context extension: new length / original_max_length
    original_max_length: int = 8192
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 ln(factor) + 1

    def check(self, head_dim: int) -> None:
        """ConfigError for values that are out of range or have no effect."""
        self.rotated_dim(head_dim)
        for name in ("theta", "factor", "original_max_length"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"rope.{name}={getattr(self, name)}; it must be above 0")
        if self.scaling == "none" and self.factor != 1:
            raise ConfigError(
                f"rope.factor={self.factor} has no effect with rope.scaling='none'; "
                "set scaling to 'llama3' or 'yarn', or factor to 1"
            )
        for low, high in (("low_frequency_factor", "high_frequency_factor"),
                          ("beta_slow", "beta_fast")):  # fmt: skip
            if getattr(self, low) >= getattr(self, high):
                raise ConfigError(
                    f"rope.{low}={getattr(self, low)} must be below "
                    f"rope.{high}={getattr(self, high)}"
                )

    def rotated_dim(self, head_dim: int) -> int:
        """Number of features of a head that are rotated; ConfigError when it is odd."""
        size = int(head_dim * self.fraction)
        if not 0 <= self.fraction <= 1 or size % 2:
            raise ConfigError(
                f"rope.fraction={self.fraction} rotates {size} of {head_dim} features; "
                "it must lie in [0, 1] and give an even number"
            )
        return size


def frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """(inverse frequencies [rotated_dim / 2] in radians per token, scale of cos and sin)."""
    size = config.rotated_dim(head_dim)
    inverse = config.theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    scale = 1.0
    if config.scaling == "llama3":
        wavelength = 2 * math.pi / inverse
        low, high = config.low_frequency_factor, config.high_frequency_factor
        smooth = (config.original_max_length / wavelength - low) / (high - low)
        smooth = np.clip(smooth, 0.0, 1.0)
        inverse = (1 - smooth) * inverse / config.factor + smooth * inverse
    elif config.scaling == "yarn":

        def dimension_of(rotations: float) -> float:
            length = config.original_max_length / (rotations * 2 * math.pi)
            return size * math.log(length) / (2 * math.log(config.theta))

        low = max(math.floor(dimension_of(config.beta_fast)), 0)
        high = min(math.ceil(dimension_of(config.beta_slow)), size - 1)
        ramp = (np.arange(size // 2) - low) / max(high - low, 1e-3)
        ramp = np.clip(ramp, 0.0, 1.0)  # 0: keep (extrapolate), 1: interpolate
        inverse = inverse / config.factor * ramp + inverse * (1 - ramp)
        scale = config.attention_factor
        if scale is None:
            scale = 0.1 * math.log(max(config.factor, 1.0)) + 1.0
    return inverse.astype(np.float32), scale


def rotate(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], config: RopeConfig
) -> Float[Array, "B T N H"]:
    """Rotate the leading features of each head by its token's position, in fp32."""
    size = config.rotated_dim(x.shape[-1])
    if size == 0:
        return x
    inverse, scale = frequencies(config, x.shape[-1])
    angle = positions.astype(jnp.float32)[:, :, None, None] * inverse[None, None, None]
    cos, sin = jnp.cos(angle) * scale, jnp.sin(angle) * scale  # [B, T, 1, size / 2]
    first, second = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
    return jnp.concatenate([rotated, x[..., size:]], axis=-1) if size < x.shape[-1] else rotated
