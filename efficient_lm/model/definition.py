"""A model as two things: its definition without arrays, and a nested dict of its arrays."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from efficient_lm.config import ModelConfig
from efficient_lm.model.language_model import LanguageModel


@dataclass(frozen=True, eq=False)  # hashable, so that jit can take it as a static argument
class ModelDefinition:
    """The structure of a model; `bind` joins it with arrays inside or outside of jit.

    parameters: nested dict, string keys, of nnx.Param that hold a ShapeDtypeStruct and carry the
    metadata `axes`, `inputs` and `outputs` of `model.parameter`.
    """

    config: ModelConfig
    graph: nnx.GraphDef
    parameters: dict[str, Any]

    def bind(self, arrays: dict[str, Any]) -> LanguageModel:
        """The model with these arrays, a nested dict of the structure of `parameters`."""
        flat = dict(_flatten(arrays))
        state = {
            path: leaf.replace(flat[tuple(map(str, path))])
            for path, leaf in nnx.to_flat_state(_abstract_state(self))
        }
        return nnx.merge(self.graph, nnx.from_flat_state(state))

    def count(self) -> int:
        """Number of scalars in the parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.parameters))


def define(config: ModelConfig, *, scan: bool | None = None) -> ModelDefinition:
    """The definition of a model; nothing is allocated.

    scan: whether repeated layers are stacked for a scan; None: as `config.scan_layers` says.
    """
    scan = config.scan_layers if scan is None else scan
    graph, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, nnx.Rngs(0), scan=scan)))
    return ModelDefinition(config, graph, _nest(nnx.to_flat_state(state)))


def initialize(definition: ModelDefinition, key: jax.Array) -> dict[str, Any]:
    """Freshly drawn arrays; run it under jit with `out_shardings` to draw them in place.

    The same with and without scanned layers: a program that draws every layer by itself, or
    fuses the draws with the slices of `unstack`, takes GPUs most of a minute to compile.
    """
    arrays = arrays_of(LanguageModel(definition.config, nnx.Rngs(key)))
    return arrays if _scans(definition) else unstack(jax.lax.optimization_barrier(arrays))


def arrays_of(model: LanguageModel) -> dict[str, Any]:
    """The arrays of a model as a nested dict with string keys."""
    flat = nnx.to_flat_state(nnx.split(model)[1])
    return _nest((path, leaf[...]) for path, leaf in flat)


def unstack(arrays: dict[str, Any]) -> dict[str, Any]:
    """Arrays for `define(config, scan=False)`: every layer apart, for decoding without slicing."""
    period = arrays["stack"].get("period", {})
    if not period:
        return arrays
    places = len(period)
    repeats = jax.tree.leaves(period)[0].shape[0]
    layers = {
        str(repeat * places + int(place)): jax.tree.map(lambda x, r=repeat: x[r], block)
        for place, block in period.items()
        for repeat in range(repeats)
    }
    for place, block in arrays["stack"].get("rest", {}).items():
        layers[str(repeats * places + int(place))] = block
    return arrays | {"stack": {"rest": layers}}


def _scans(definition: ModelDefinition) -> bool:
    return "period" in definition.parameters["stack"]


def _abstract_state(definition: ModelDefinition):
    """The nnx.State (integer keys for list items) of the definition."""
    return nnx.from_flat_state(
        {
            tuple(int(part) if part.isdigit() else part for part in path): leaf
            for path, leaf in _flatten(definition.parameters)
        }
    )


def _flatten(tree: dict[str, Any], prefix: tuple[str, ...] = ()):
    """(path, leaf) of a nested dict."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def _nest(items) -> dict[str, Any]:
    """Nested dict with string keys from (path, leaf) pairs."""
    tree: dict[str, Any] = {}
    for path, leaf in items:
        node = tree
        for part in path[:-1]:
            node = node.setdefault(str(part), {})
        node[str(path[-1])] = leaf
    return tree
