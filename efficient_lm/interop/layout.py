"""How arrays of ours lie in one tensor of a Hugging Face checkpoint.

A layout names axes in the order stored, products in (), and 1 for an axis without a name:
"(heads head_dim) embed". Where a tensor holds several arrays, + follows the product along which
they are joined: in "(heads head_dim)+ embed" the second comes after the whole first, and in
"(heads head_dim)+heads embed" the product is cut into as many pieces as there are heads, and each
piece of the first is followed by that of the second.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

PRODUCT = re.compile(r"(?:\(([^)]*)\)|(\w+))(\+(\w*))?")


@dataclass(frozen=True)
class Layout:
    """Where one array lies: `text` as above, its `axes` in our order, and sizes of all named."""

    text: str
    axes: tuple[str, ...]
    sizes: Mapping[str, int]

    def order(self) -> list[str]:
        """Our axes in the order stored."""
        products = [many or one for many, one, _, _ in PRODUCT.findall(self.text)]
        return [name for product in products for name in product.split() if name != "1"]

    def cut(self) -> tuple[list[int], int | None]:
        """(shape with the joined product as two axes: pieces, and sizes of them; the second)."""
        shape: list[int] = []
        axis = None
        for many, one, joined, within in PRODUCT.findall(self.text):
            size = math.prod(self.sizes[n] for n in (many or one).split() if n != "1")
            if joined:
                shape.append(self.sizes[within] if within else 1)
                axis, size = len(shape), size // shape[-1]
            shape.append(size)
        return shape, axis


def stored_shape(layouts: Sequence[Layout]) -> tuple[int, ...]:
    """Shape of the tensor that holds arrays of these layouts."""
    shape, axis = _joined(layouts)
    if axis is None:
        return tuple(shape)
    return (*shape[: axis - 1], shape[axis - 1] * shape[axis], *shape[axis + 1 :])


def split(tensor: np.ndarray, layouts: Sequence[Layout]) -> Iterator[np.ndarray]:
    """Each array in a stored tensor, with our axes; views where one can be."""
    whole = tensor.reshape(_joined(layouts)[0])
    for layout, place in zip(layouts, _places(layouts), strict=True):
        order = layout.order()
        part = whole[place].reshape([layout.sizes[name] for name in order])
        yield part.transpose([order.index(name) for name in layout.axes])


def join(arrays: Sequence[np.ndarray], layouts: Sequence[Layout]) -> np.ndarray:
    """The tensor to store, contiguous; the inverse of `split`."""
    ordered = [
        array.transpose([layout.axes.index(name) for name in layout.order()])
        for array, layout in zip(arrays, layouts, strict=True)
    ]
    if len(ordered) == 1:
        return np.ascontiguousarray(ordered[0]).reshape(stored_shape(layouts))
    whole = np.empty(_joined(layouts)[0], arrays[0].dtype)
    for array, layout, place in zip(ordered, layouts, _places(layouts), strict=True):
        whole[place] = array.reshape(layout.cut()[0])
    return whole.reshape(stored_shape(layouts))


def _joined(layouts: Sequence[Layout]) -> tuple[list[int], int | None]:
    """`Layout.cut` of the whole tensor."""
    shape, axis = layouts[0].cut()
    if axis is not None:
        shape[axis] = sum(layout.cut()[0][axis] for layout in layouts)
    return shape, axis


def _places(layouts: Sequence[Layout]) -> Iterator[tuple[slice, ...]]:
    """Which part of the tensor, in the shape of `_joined`, each array is."""
    start = 0
    for layout in layouts:
        shape, axis = layout.cut()
        if axis is None:
            yield ()
            continue
        yield (*(slice(None),) * axis, slice(start, start + shape[axis]))
        start += shape[axis]
