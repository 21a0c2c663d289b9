"""AdamW and Muon over a tree of parameters, grouped by the metadata that parameters carry."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import ArrayLike, Num, PyTree

from efficient_lm.config import OptimizerConfig
from efficient_lm.training.schedules import Schedule, make_schedule

# Moonlight (arXiv:2502.16982): Muon updates with the root mean square of typical AdamW updates.
RMS_MATCH = 0.2
# Far below any gradient norm, so that Newton-Schulz stays free of scale, and above underflow.
NEWTON_SCHULZ_EPSILON = 1e-15


class ParameterGroup(NamedTuple):
    """How one parameter is optimized; axes not named in `inputs` or `outputs` are batch axes."""

    optimizer: Literal["muon", "adamw"]
    inputs: tuple[int, ...]  # axes that together are the rows (fan-in) of the Muon matrix
    outputs: tuple[int, ...]  # axes that together are the columns (fan-out)
    decay: bool


def parameter_groups(config: OptimizerConfig, parameters: PyTree) -> dict[str, ParameterGroup]:
    """Path -> group for every parameter; `parameters` is a tree of `nnx.Param` (or its State).

    A parameter is a hidden matrix if its metadata names `inputs` and `outputs` among its `axes`.
    Hidden matrices take Muon (when configured) and weight decay. All others (embeddings, tied or
    untied heads, routers, norms, biases, sinks, gates, short convolutions) take AdamW without
    decay. Only shapes and metadata are read, so leaves may be ShapeDtypeStructs.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        parameters, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    groups = {}
    for keys, parameter in leaves:
        path = path_name(keys)
        metadata = parameter.get_metadata() if isinstance(parameter, nnx.Variable) else {}
        axes, rank = metadata.get("axes"), len(parameter.shape)
        inputs, outputs = metadata.get("inputs", ()), metadata.get("outputs", ())
        if bool(inputs) != bool(outputs):
            raise ValueError(f"{path}: inputs={inputs}, outputs={outputs}; give both or neither")
        if inputs:
            if axes is None or len(axes) != rank:
                raise ValueError(f"{path}: axes={axes} must name each of the {rank} dimensions")
            unknown = [name for name in (*inputs, *outputs) if axes.count(name) != 1]
            if unknown or set(inputs) & set(outputs):
                raise ValueError(
                    f"{path}: inputs={inputs} and outputs={outputs} must be disjoint, each axis "
                    f"once in axes={axes}"
                )
        groups[path] = ParameterGroup(
            optimizer="muon" if inputs and config.name == "muon" else "adamw",
            inputs=tuple(axes.index(name) for name in inputs),
            outputs=tuple(axes.index(name) for name in outputs),
            decay=bool(inputs),
        )
    return groups


def format_groups(groups: dict[str, ParameterGroup]) -> str:
    """A table of `parameter_groups`, one line a parameter, for logs and golden files."""
    width = max((len(path) for path in groups), default=0)
    lines = []
    for path, group in groups.items():
        axes = f"{group.inputs} -> {group.outputs}" if group.optimizer == "muon" else ""
        decay = "decay" if group.decay else "no decay"
        lines.append(f"{path:{width}}  {group.optimizer:5}  {decay:8}  {axes}".rstrip())
    return "\n".join(lines)


def learning_rate(config: OptimizerConfig, total_steps: int) -> Schedule:
    """The schedule of AdamW's learning rate, for the optimizer and for the log."""
    return make_schedule(config.schedule, config.learning_rate, total_steps)


def make_optimizer(
    config: OptimizerConfig, parameters: PyTree, total_steps: int
) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW, or Muon for hidden matrices and AdamW for the rest.

    Args:
      config: `weight_decay` is multiplied by the learning rate, as in PyTorch and optax.
      parameters: tree of `nnx.Param` with metadata `axes`, `inputs`, `outputs`; read here only.
      total_steps: updates of the whole run; the schedules end there.

    The transformation works on any tree with the same paths: nested dicts of arrays
    (`nnx.to_pure_dict`) or an `nnx.State`. One norm over all parameters is clipped, before the
    groups part. Muon (K. Jordan, 2024) keeps a float32 momentum, takes its Nesterov form, and
    replaces it by Newton-Schulz with `muon_steps` iterations; axes such as "layers" or "experts"
    are batch axes, each matrix by itself. Scales: "rms_match" 0.2 sqrt(max(n_in, n_out))
    (Moonlight, with AdamW's learning rate and decay) or "width_transfer"
    sqrt(max(1, n_out / n_in)) (Jordan, with a learning rate of its own).
    """
    groups = parameter_groups(config, parameters)
    adamw = optax.chain(
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon, mu_dtype=jnp.float32),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda tree: _by_path(lambda path: groups[path].decay, tree)
        ),
        optax.scale_by_learning_rate(learning_rate(config, total_steps)),
    )
    if config.name == "muon":
        update = optax.partition(
            {"adamw": adamw, "muon": _muon(config, groups, total_steps)},
            lambda tree: _by_path(lambda path: groups[path].optimizer, tree),
        )
    else:
        update = adamw
    if config.clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    return _standard_promotion(update)


def _muon(
    config: OptimizerConfig, groups: dict[str, ParameterGroup], total_steps: int
) -> optax.GradientTransformation:
    """Muon with decoupled weight decay for a tree that holds hidden matrices alone."""
    peak = config.muon_learning_rate
    if peak is None:
        peak = config.learning_rate

    def dimension_numbers(tree):
        def of(path):
            group = groups[path]
            return optax.contrib.MuonDimensionNumbers(group.inputs, group.outputs)

        return _by_path(of, tree)

    def scale(updates, params=None):
        del params
        return jax.tree_util.tree_map_with_path(
            lambda keys, x: x * _muon_scale(config.muon_scaling, groups[path_name(keys)], x.shape),
            updates,
        )

    return optax.chain(
        optax.contrib.scale_by_muon(
            ns_steps=config.muon_steps,
            beta=config.muon_momentum,
            eps=NEWTON_SCHULZ_EPSILON,
            mu_dtype=jnp.float32,
            nesterov=True,
            weight_dimension_numbers=dimension_numbers,
        ),
        optax.stateless(scale),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(make_schedule(config.schedule, peak, total_steps)),
    )


def _muon_scale(scaling: str, group: ParameterGroup, shape: tuple[int, ...]) -> float:
    """Factor on the orthogonal update of a matrix [n_in, n_out]."""
    n_in = math.prod(shape[axis] for axis in group.inputs)
    n_out = math.prod(shape[axis] for axis in group.outputs)
    if scaling == "rms_match":
        return RMS_MATCH * math.sqrt(max(n_in, n_out))
    return math.sqrt(max(1.0, n_out / n_in))


def _standard_promotion(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, usable under strict dtype promotion: optax raises floats to an int32 count."""

    def init(params):
        with jax.numpy_dtype_promotion("standard"):
            return inner.init(params)

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params)

    return optax.GradientTransformation(init, update)


def update_ema(
    average: PyTree, parameters: PyTree, decay: float, step: Num[ArrayLike, ""]
) -> PyTree:
    """Exponential moving average of the weights after update number `step` (from 0).

    `average` starts as a copy of the initial parameters. The decay in force is
    min(decay, (1 + step) / (10 + step)), so the initial weights are forgotten early and no bias
    correction is needed when the average is read. Computed in float32, kept in its own dtype.
    """
    step = jnp.asarray(step, jnp.float32)
    kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))

    def mix(old, new):
        old32, new32 = old.astype(jnp.float32), new.astype(jnp.float32)
        return (new32 + kept * (old32 - new32)).astype(old.dtype)

    return jax.tree.map(mix, average, parameters)


def path_name(keys: tuple[Any, ...]) -> str:
    """ "layers/0/kernel" of a key path; the same for nested dicts, `nnx.State` and its Params."""
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):  # the array inside an nnx.Param
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _by_path(function, tree: PyTree) -> PyTree:
    """`tree` with each leaf replaced by `function(path)`."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: function(path_name(keys)), tree)
