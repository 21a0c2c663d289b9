"""Evaluation of a work directory: parameters on the mesh, a split, metrics and their origin."""

import functools
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from efficient_lm.compilation import compiler_options
from efficient_lm.config import Config
from efficient_lm.data import synthetic
from efficient_lm.data.pipeline import make_evaluation_batches
from efficient_lm.data.tokenizers import check_vocabulary
from efficient_lm.errors import DataError
from efficient_lm.evaluation.perplexity import evaluate_batches, make_scorer
from efficient_lm.evaluation.recall import evaluate_recall, make_predictor
from efficient_lm.inference.load import abstract_arrays, open_run
from efficient_lm.model.definition import define
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.parallel.placement import data_shard, place_batch, place_whole
from efficient_lm.parallel.rules import parameter_shardings
from efficient_lm.training.manifest import versions


def evaluate_run(
    workdir: str | Path,
    *,
    split: str = "valid",
    override: Callable[[Config], Config] = lambda config: config,
    step: int | None = None,
    dtype: str | None = None,
    average: bool | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Score a split with a run of ours or a converted checkpoint, on all devices.

    Args:
      split: "valid" or "train".
      override: changes the config of the run, for other data, lengths, strides or batch sizes.
      step, dtype, average: as in `load`.
      limit: at most so many batches, spread over the split; None: every token once.

    Returns:
      A JSON-able dict: metrics (see `evaluate_batches`, and for synthetic tasks `recall`, see
      `evaluate_recall`), and what they belong to: command, workdir, step, weights, split, data,
      device, versions, time.

    Raises:
      UserError: the run, its data or the overrides do not fit.
    """
    workdir = Path(workdir)
    saved = open_run(workdir, step=step, dtype=dtype, average=average)
    config = override(saved.config)
    tokenizer = saved.tokenizer()
    if tokenizer is None:
        raise DataError(f"{workdir} has no tokenizer; text cannot be read for its model")
    check_vocabulary(tokenizer, config.model.vocabulary_size)
    mesh = make_mesh(config.parallel)
    given = config.evaluation.batch_size or config.data.batch_size
    rows = -(-given // mesh.size) * mesh.size  # padded rows score nothing
    index, count = data_shard(mesh)
    batches = functools.partial(
        make_evaluation_batches,
        config.data,
        tokenizer,
        split,
        batch_size=rows,
        stride=config.evaluation.stride,
        limit=limit,
    )
    definition = define(config.model)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_arrays(definition),
        parameter_shardings(mesh, definition.parameters, config.parallel.rules),
    )
    parameters = saved.restore(abstract)
    everywhere = NamedSharding(mesh, PartitionSpec())  # all processes read the results
    scorer = jax.jit(
        make_scorer(config, definition, mesh, np.asarray(tokenizer.byte_lengths)),
        out_shardings=everywhere,
        compiler_options=compiler_options(everywhere),
    )
    metrics = evaluate_batches(
        lambda b: scorer(parameters, place_batch(b, mesh)),
        batches(process_index=index, process_count=count),
    )
    if config.data.source in synthetic.TASKS:
        predictor = jax.jit(
            make_predictor(config, definition, mesh),
            out_shardings=everywhere,
            compiler_options=compiler_options(everywhere),
        )
        metrics["recall"] = evaluate_recall(
            lambda b: predictor(parameters, place_whole(b, mesh)), batches()
        )
    device = mesh.devices.flat[0]
    return {
        "metrics": metrics,
        "command": sys.argv,
        "workdir": str(workdir),
        "step": saved.reader.found_step,
        "weights": saved.part,
        "split": split,
        "dtype": config.model.dtype,
        "data": {
            "source": config.data.source,
            "paths": list(config.data.valid_paths or config.data.paths),
            "sequence_length": config.data.sequence_length,
            "stride": config.evaluation.stride or config.data.sequence_length,
            "batch_limit": limit,
        },
        "parameters": definition.count(),
        "device": device.device_kind,
        "devices": mesh.size,
        "versions": versions(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
