"""A state as named arrays: any pytree becomes {part: {path: leaf}}, and back."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

Parts = dict[str, dict[str, Any]]


def paths(state: Any) -> list[tuple[str, str]]:
    """(part, path within the part) of each leaf, in the order of `jax.tree.leaves`.

    The part is the first key: the entry of a mapping or the field of a NamedTuple or dataclass;
    entries that are arrays themselves make up the part "values".
    """
    names = []
    for path, _ in tree_flatten_with_path(state)[0]:
        if not path:
            raise TypeError("the state to save must be a mapping, NamedTuple or dataclass of trees")
        part = keystr(path[:1], simple=True) if len(path) > 1 else "values"
        names.append((part, keystr(path[1:] or path, simple=True, separator=".")))
    if len(set(names)) < len(names):
        raise ValueError("two leaves of the state have the same path; rename one of the keys")
    return names


def by_part(state: Any) -> Parts:
    """Leaves by part and path; Python and NumPy numbers become 0-d NumPy arrays."""
    parts: Parts = {}
    for (part, path), leaf in zip(paths(state), jax.tree.leaves(state), strict=True):
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            leaf = np.asarray(leaf)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{part}.{path} is a PRNG key; save jax.random.key_data of it")
        if leaf.dtype == object or leaf.dtype.kind in "SU":
            raise TypeError(f"{part}.{path} is no array; only arrays and numbers can be saved")
        parts.setdefault(part, {})[path] = leaf
    return parts


def table(leaves: Mapping[str, Any]) -> dict[str, list]:
    """{path: [shape, dtype]}, as in the manifest of a checkpoint."""
    return {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves.items()}


def flat(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{"part.path": entry} from {part: {path: entry}}."""
    return {f"{part}.{path}": entry for part, t in parts.items() for path, entry in t.items()}


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and the sharding to restore with; the first device when the leaf has none."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def like(array: jax.Array | None, leaf: Any) -> Any:
    """`array` as the kind of array that `leaf` is; None stands for an array without elements."""
    if array is None:
        target = abstract(leaf)
        array = jax.device_put(np.zeros(target.shape, target.dtype), target.sharding)
    return np.asarray(array) if isinstance(leaf, np.ndarray) else array


def without_empty(parts: Parts) -> Parts:
    """`parts` without arrays of no elements, which tensorstore does not store."""
    kept = {part: {p: leaf for p, leaf in leaves.items() if leaf.size}
            for part, leaves in parts.items()}  # fmt: skip
    return {part: leaves for part, leaves in kept.items() if leaves}
