"""How one array is laid out in a Hugging Face checkpoint: axis names in order, products in ()."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np


def stored_shape(layout: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of the stored tensor: "(heads head_dim) embed" is (heads * head_dim, embed)."""
    groups = re.findall(r"\(([^)]*)\)|(\S+)", layout)
    return tuple(math.prod(sizes[n] for n in (many or one).split()) for many, one in groups)


def from_stored(
    tensor: np.ndarray, layout: str, axes: Sequence[str], sizes: Mapping[str, int]
) -> np.ndarray:
    """A view of the stored tensor with our `axes`."""
    names = _names(layout)
    return tensor.reshape([sizes[n] for n in names]).transpose([names.index(a) for a in axes])


def to_stored(
    array: np.ndarray, layout: str, axes: Sequence[str], sizes: Mapping[str, int]
) -> np.ndarray:
    """The tensor to store, contiguous, from our array with `axes`."""
    ordered = array.transpose([list(axes).index(n) for n in _names(layout)])
    return np.ascontiguousarray(ordered).reshape(stored_shape(layout, sizes))


def _names(layout: str) -> list[str]:
    return re.findall(r"\w+", layout)
