"""The shapes and ops that are timed; no imports, so that the peer's process can read it."""

from typing import NamedTuple

# kda: the gated delta rule with a decay of each key feature.
OPS = ("gated_delta_rule", "scalar_decay", "plain", "delta_rule", "kda")


class Shape(NamedTuple):
    """sizes: rows B, tokens T, heads of q and k, heads of v, features of a head."""

    name: str
    sizes: tuple[int, int, int, int, int]
    ops: tuple[str, ...] = OPS
    passes: tuple[str, ...] = ("forward", "forward_backward")


SHAPES = (
    Shape("B8_T4096", (8, 4096, 16, 16, 128)),
    Shape("B1_T32768", (1, 32768, 16, 16, 128), (*OPS[:3], "kda"), ("forward",)),
    Shape("qwen3_5_8k", (1, 8192, 16, 32, 128), OPS[:1]),
    Shape("qwen3_5_32k", (1, 32768, 16, 32, 128), OPS[:1]),
)
