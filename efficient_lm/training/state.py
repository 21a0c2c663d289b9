"""Everything that a training step reads and writes, as one pytree."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efficient_lm.config import Config
from efficient_lm.model.definition import ModelDefinition, initialize
from efficient_lm.parallel.rules import parameter_shardings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: updates done or skipped. parameters, average: nested dicts (average: EMA or None).

    optimizer: the state of optax. sums: metrics since the last line of the log. skipped: updates
    left out for non-finite values, and how many of them in a row up to now. key: of all draws.
    Leaves are arrays, or shapes, or shardings.
    """

    step: Any
    parameters: Any
    optimizer: Any
    average: Any
    sums: Any
    skipped: Any
    skipped_in_a_row: Any
    key: Any

    def as_dict(self) -> dict[str, Any]:
        """A plain dict for checkpoints; without `average` when there is none."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """The inverse of `as_dict`."""
        return cls(**({"average": None} | values))


SUMS = ("loss_sum", "weight_sum", "correct_sum", "bytes_sum")


def make_initializer(
    config: Config, definition: ModelDefinition, optimizer: optax.GradientTransformation
):
    """A function of nothing that draws the first state; jit it with `out_shardings`."""

    def initial() -> TrainState:
        key = jax.random.key(config.training.seed)
        parameters = initialize(definition, key)
        average = None
        if config.optimizer.ema_decay is not None:
            average = jax.tree.map(jnp.copy, parameters)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            parameters=parameters,
            optimizer=optimizer.init(parameters),
            average=average,
            sums={name: jnp.zeros((), jnp.float32) for name in SUMS},
            skipped=jnp.zeros((), jnp.int32),
            skipped_in_a_row=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(jax.random.fold_in(key, 1)),
        )

    return initial


def abstract_state(
    initial, definition: ModelDefinition, mesh: Mesh, rules: str = "fsdp"
) -> TrainState:
    """Shapes and shardings of the state: arrays shaped like a parameter are placed as it is.

    rules: a preset of `parallel.rules`. Optimizer moments carry the path of their parameter at its
    end, so they are found by path.
    """
    shapes = jax.eval_shape(initial)
    shardings = {
        _names(path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(
            parameter_shardings(mesh, definition.parameters, rules)
        )
    }
    longest = max(len(path) for path in shardings)
    replicated = NamedSharding(mesh, PartitionSpec())
    parameter_shapes = {
        _names(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.parameters)
    }

    def place(path, leaf):
        names = _names(path)
        for length in range(min(longest, len(names)), 0, -1):
            suffix = names[-length:]
            if parameter_shapes.get(suffix) == leaf.shape:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[suffix])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    return jax.tree_util.tree_map_with_path(place, shapes)


def _names(path) -> tuple[str, ...]:
    """The parts of a key path as strings."""
    return tuple(jax.tree_util.keystr((part,), simple=True) for part in path)
