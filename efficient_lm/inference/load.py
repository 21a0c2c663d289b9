"""A trained or converted model from its work directory."""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.config import Config
from efficient_lm.data.tokenizers import Tokenizer, load_tokenizer
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.inference.model import Model
from efficient_lm.model.definition import ModelDefinition, define
from efficient_lm.training.checkpoint import CheckpointReader, open_for_reading
from efficient_lm.training.setup import warn


def load(
    workdir: str | Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    average: bool | None = None,
) -> tuple[Model, Tokenizer | None, Config]:
    """(model, tokenizer, config) of a run of ours or of a converted checkpoint.

    Parameters go to the first device, with every layer apart: decoding then reads each weight
    where it lies, and the model here has another layout than the stacked one of training. While
    layers are cut apart, both layouts are in memory.

    Args:
      workdir: directory with config.json, checkpoints/ and, for text, tokenizer/.
      step: of the checkpoint; None: the newest one that is good.
      dtype: "float32" or "bfloat16" to compute in; None: `config.model.dtype`. Matrices are kept in
        this type, which changes no result, since the model casts them to it wherever it uses them;
        norms and other vectors stay in fp32.
      average: whether to take the moving average of the weights; None: if the run kept one, as its
        own validation does.

    Returns:
      model: `model(tokens).logits`; see `Model`.
      tokenizer: None for a checkpoint that was converted without one.
      config: of the run, with `dtype` in place.

    Raises:
      CheckpointError: nothing (good) is there, or it does not fit config.json.
      ConfigError: config.json or `dtype` is not valid.
    """
    workdir = Path(workdir)
    saved = open_run(workdir, step=step, dtype=dtype, average=average)
    definition = define(saved.config.model)
    arrays = saved.restore(abstract_arrays(definition))
    return Model.from_arrays(saved.config.model, arrays), saved.tokenizer(), saved.config


@dataclass(frozen=True)
class SavedRun:
    """A work directory with a checkpoint to read: `part` is "average" or "parameters"."""

    workdir: Path
    config: Config
    reader: CheckpointReader
    part: str
    step: int | None

    def restore(self, abstract: Any) -> dict[str, Any]:
        """The parameters in the shapes, dtypes and shardings of `abstract`."""
        return self.reader.restore_part(self.part, abstract, self.step)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the run; None for a checkpoint that was converted without one."""
        directory = self.workdir / "tokenizer"
        return load_tokenizer(directory) if directory.is_dir() else None


def open_run(
    workdir: Path, *, step: int | None, dtype: str | None, average: bool | None
) -> SavedRun:
    """What `load` reads from, arguments and errors as there; no array is read yet."""
    # A damaged checkpoint is met for each part that is read, and told once.
    reader = open_for_reading(workdir, warn=functools.cache(warn))
    config = read_config(workdir)
    if dtype is not None:
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype={dtype!r}; allowed: 'float32', 'bfloat16'")
        config = replace(config, model=replace(config.model, dtype=dtype))
    if average is None:
        average = "average" in reader.parts(step)
    return SavedRun(workdir, config, reader, "average" if average else "parameters", step)


def read_config(workdir: Path) -> Config:
    """The checked config of a work directory; CheckpointError when it has none that is JSON."""
    path = workdir / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path} ({error}); give the --workdir of a run or of a conversion"
        ) from None
    try:
        return Config.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def abstract_arrays(definition: ModelDefinition):
    """Shapes of the parameters with matrices in the model's dtype and vectors in fp32."""

    def shape(leaf: nnx.Variable) -> jax.ShapeDtypeStruct:
        vector = len([axis for axis in leaf.axes if axis != "layers"]) < 2
        dtype = jnp.float32 if vector else jnp.dtype(definition.config.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree.map(
        shape, definition.parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
