"""The models that are compared: one pattern of layers each, and the same number of parameters."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from efficient_lm.config import Config, layer
from efficient_lm.training.in_memory import equal_hidden_dim

MIXERS = ("attention", "hybrid", "gated_deltanet", "mamba2")


@dataclass(frozen=True)
class Shape:
    """Sizes in features, tokens and rows; a memory of either kind has embed_dim * head_dim numbers.

    hidden_dim: of the feed-forward beside attention; other mixers get what makes the number of
    parameters equal. value_groups: value heads of a
    key head, and query heads of a key-value head in the hybrid's attention.
    """

    embed_dim: int
    num_layers: int
    hidden_dim: int
    vocabulary_size: int
    head_dim: int
    length: int
    rows: int
    value_groups: int = 2
    expand: int = 2  # of Mamba-2, with head_dim / expand features a head and as large a state
    first_window: int | None = None  # tokens that the first layer of `attention` sees; None: all
    attention_heads: int | None = None  # None: embed_dim / head_dim
    dtype: str = "float32"
    remat: str = "none"


def model_fields(shape: Shape, mixer: str) -> dict[str, Any]:
    """Nested fields of config.model. Mixers with 4 embed_dim^2 parameters (5 where
    value_groups=1), but for Mamba-2, and feed-forwards that make up for the differences."""
    fields = _fields(shape, mixer, shape.hidden_dim)
    return fields | {"ffns": {"dense": {"hidden_dim": _hidden_dim(shape, mixer)}}}


@cache
def _hidden_dim(shape: Shape, mixer: str) -> int:
    def model(mixer):
        return Config.from_dict({"model": _fields(shape, mixer, shape.hidden_dim)}).model

    multiple = -(-shape.embed_dim // 64)  # large matrices keep sizes that hardware likes
    return equal_hidden_dim(model(mixer), model("attention"), multiple)


def _fields(shape: Shape, mixer: str, hidden_dim: int) -> dict[str, Any]:
    heads = shape.embed_dim // shape.head_dim
    attention_heads = shape.attention_heads or heads
    shared = attention_heads // shape.value_groups
    delta = layer("gated_deltanet")
    first = () if shape.first_window is None else (layer(window=shape.first_window),)
    patterns = {
        "attention": (*first, *(layer(),) * (shape.num_layers - len(first))),
        "gated_deltanet": (delta,),
        "hybrid": (delta, delta, delta, layer(gate="sigmoid", num_key_value_heads=shared)),
        "mamba2": (layer("mamba2"),),
    }
    options = {
        "attention": {"num_heads": attention_heads, "qk_norm": True},
        "gated_deltanet": {"num_value_heads": heads, "num_key_heads": heads // shape.value_groups},
    }
    if mixer == "mamba2":
        inner = shape.head_dim // shape.expand
        options["mamba2"] = {"expand": shape.expand, "head_dim": inner, "state_dim": inner}
    return {
        "vocabulary_size": shape.vocabulary_size,
        "embed_dim": shape.embed_dim,
        "num_layers": shape.num_layers,
        "max_length": max(shape.length, 1024),
        "layers": patterns[mixer],
        "mixers": options,
        "ffns": {"dense": {"hidden_dim": hidden_dim}},
        "dtype": shape.dtype,
        "remat": shape.remat,
    }
