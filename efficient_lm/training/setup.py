"""What a run needs before its first step: data, mesh, compiled functions, first or saved state."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from efficient_lm.compilation import compiler_options
from efficient_lm.config import Config
from efficient_lm.data.pipeline import make_train_iterator
from efficient_lm.data.tokenizers import (
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
    make_tokenizer,
)
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.model.definition import ModelDefinition, define
from efficient_lm.parallel.check import check_mesh
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.parallel.placement import data_shard
from efficient_lm.training import processes
from efficient_lm.training.checkpoint import Checkpointer
from efficient_lm.training.optimizer import make_optimizer
from efficient_lm.training.state import TrainState, abstract_state, make_initializer
from efficient_lm.training.step import jit_train_step, make_evaluation_step, make_train_step


@dataclass(frozen=True)
class Run:
    """A run that is ready to take its next step; `state` is to be donated to `train_step`."""

    config: Config
    workdir: Path
    mesh: Mesh
    definition: ModelDefinition
    tokenizer: Tokenizer
    iterator: Any
    checkpointer: Checkpointer
    state: TrainState
    start: int  # steps that `state` has behind it
    train_step: Callable
    evaluation_step: Callable


def make_run_mesh(config: Config) -> Mesh:
    """The mesh of a run; ConfigError where the batch cannot be split over it."""
    mesh = make_mesh(config.parallel)
    check_mesh(config, define(config.model), mesh)
    return mesh


def set_up(config: Config, workdir: Path, mesh: Mesh) -> Run:
    """Make the run's tokenizer, and draw its state or restore the newest one."""
    tokenizer = _tokenizer(config, workdir)
    check_vocabulary(tokenizer, config.model.vocabulary_size)
    index, count = data_shard(mesh)
    iterator = make_train_iterator(config.data, tokenizer, process_index=index, process_count=count)
    definition = define(config.model)
    optimizer = make_optimizer(config.optimizer, definition.parameters, config.training.steps)
    initial = make_initializer(config, definition, optimizer)
    abstract = abstract_state(initial, definition, mesh, config.parallel.rules)
    checkpointer = Checkpointer(workdir, config.checkpointing, warn=warn)
    restored = checkpointer.restore(abstract.as_dict())
    if restored is None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        draw = jax.jit(
            initial, out_shardings=shardings, compiler_options=compiler_options(shardings)
        )
        state, start = draw(), 0
    else:
        state, start = TrainState.from_dict(restored.state), restored.step
        iterator.set_state(restored.iterator)
    _write_config(config, workdir)
    arguments = (config, definition)
    lengths = np.asarray(tokenizer.byte_lengths)
    train_step = make_train_step(*arguments, optimizer, mesh, lengths)
    return Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        definition=definition,
        tokenizer=tokenizer,
        iterator=iterator,
        checkpointer=checkpointer,
        state=state,
        start=start,
        train_step=jit_train_step(train_step, abstract),
        evaluation_step=jax.jit(
            make_evaluation_step(*arguments, mesh, lengths), compiler_options=compiler_options()
        ),
    )


def _check_tokenizer(config: Config, workdir: Path) -> None:
    """ConfigError where the run was begun with another tokenizer than the config names."""
    try:
        before = json.loads((workdir / "config.json").read_text())["data"]["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # the first start was cut off
    if before != config.data.tokenizer:
        raise ConfigError(
            f"config.data.tokenizer={config.data.tokenizer!r}, but the run in {workdir} has a copy "
            f"of {before!r}; give that or another --workdir"
        )


def _tokenizer(config: Config, workdir: Path) -> Tokenizer:
    """The tokenizer saved in the run, so that a resumed run keeps its ids, or a new one, saved."""
    directory = workdir / "tokenizer"

    def make() -> None:
        if directory.exists():
            _check_tokenizer(config, workdir)
            return
        if any(workdir.glob("checkpoints/*")):
            warn(f"{directory} is missing and made again; its ids are the same if the data are")
        tokenizer = make_tokenizer(config.data)
        partial = workdir / "tokenizer.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with _writing(workdir):
            tokenizer.save(partial)
            os.replace(partial, directory)

    processes.from_first("tokenizer", make)
    return load_tokenizer(directory)


def _write_config(config: Config, workdir: Path) -> None:
    """config.json, whole at any moment."""
    if jax.process_index() != 0:
        return
    partial = workdir / "config.json.partial"
    with _writing(workdir):
        partial.write_text(json.dumps(config.to_dict(), indent=2))
        os.replace(partial, workdir / "config.json")


@contextmanager
def _writing(workdir: Path) -> Iterator[None]:
    """Failures of the file system as one line."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the work directory {workdir}: {error.strerror}; "
            "free some space or choose another --workdir"
        ) from None


def warn(line: str) -> None:
    """One line on stderr."""
    print(f"warning: {line}", file=sys.stderr)
