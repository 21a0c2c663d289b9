"""Which checkpoints of a run are kept."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from efficient_lm.config import CheckpointingConfig
from efficient_lm.training import manifest


def outdated(
    directory: Path,
    steps: Sequence[int],
    newest: int,
    config: CheckpointingConfig,
    damaged: Collection[int],
) -> list[int]:
    """The steps to delete: all but the last and the best of those up to `newest`.

    Later steps are of a course that was given up.
    """
    values = {}
    for step in steps:
        if step > newest or step in damaged:
            continue
        try:
            metrics = manifest.read(directory / str(step))["metrics"]
        except manifest.Damaged:
            continue
        value = metrics.get(config.best_metric)
        values[step] = np.inf if value is None or np.isnan(value) else float(value)
    known = [step for step, value in values.items() if np.isfinite(value)]
    best = sorted(known, key=lambda step: (values[step], -step))[: config.keep_best]
    keep = {*sorted(values)[-config.keep_last :], *best, newest}
    return [step for step in steps if step not in keep]
