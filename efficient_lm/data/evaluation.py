"""Finite batches that score each token of a split, or each answer of a task, exactly once."""

from collections.abc import Iterator

import numpy as np

from efficient_lm.config import DataConfig
from efficient_lm.data import synthetic
from efficient_lm.data.batch import Batch, empty_batch
from efficient_lm.data.corpus import Corpus
from efficient_lm.data.packing import make_batch
from efficient_lm.errors import DataError


class _Batches:
    """Items (windows or rows, by number) dealt to batches and processes; re-iterable."""

    def __init__(
        self, items: int, *, limit: int | None, local: int, process_index: int, process_count: int
    ):
        batch_size = local * process_count
        self._items = np.arange(items)
        if limit is not None and limit * batch_size < items:  # spread over the split
            self._items = np.arange(limit * batch_size) * items // (limit * batch_size)
        self._batches = -(-len(self._items) // batch_size)
        self._local, self._index, self._count = local, process_index, process_count

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self._batches):
            first = (number * self._count + self._index) * self._local
            yield self._batch(self._items[first : first + self._local])


class EvaluationBatches(_Batches):
    """Windows of a corpus that advance by `stride`; every label after the first token once."""

    def __init__(self, corpus: Corpus, config: DataConfig, *, stride: int, **dealing):
        if len(corpus) < 2:
            raise DataError(f"the split has {len(corpus)} token(s); at least 2 are needed to score")
        self._corpus, self._config, self._stride = corpus, config, stride
        # The first window scores all its labels, each further one the last `stride` of its own.
        super().__init__(
            1 + max(0, -(-(len(corpus) - 1 - config.sequence_length) // stride)), **dealing
        )

    def _batch(self, windows: np.ndarray) -> Batch:
        length = self._config.sequence_length
        rows = [[(int(window) * self._stride, length)] for window in windows]
        rows += [[]] * (self._local - len(rows))
        batch = make_batch(self._corpus, rows, length, self._config.mask_across_documents)
        later = np.flatnonzero(windows > 0)
        batch["weights"][later, : length - self._stride] = 0.0
        return batch


class TaskBatches(_Batches):
    """The rows of a split of a synthetic task."""

    def __init__(self, config: DataConfig, split: str, **dealing):
        self._task, self._config, self._split = synthetic.make_task(config), config, split
        super().__init__(self._task.valid_rows, **dealing)

    def _batch(self, rows: np.ndarray) -> Batch:
        batch = self._task.batch(self._config, self._split, rows)
        padding = empty_batch(self._local - len(rows), self._config.sequence_length)
        return {name: np.concatenate([batch[name], padding[name]]) for name in batch}
