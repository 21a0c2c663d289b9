"""Training batches from groups of documents that are packed one group after another.

Where a row lies is known only once its group is packed, so the state is the group and the row in
it; restoring packs that one group again.
"""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from efficient_lm.config import DataConfig
from efficient_lm.data.batch import Batch
from efficient_lm.data.corpus import Corpus
from efficient_lm.data.packing import Span, first_fit, make_batch
from efficient_lm.errors import DataError

DOCUMENTS_PER_GROUP = 4096  # large: rows fill well; small: restoring is quick


@runtime_checkable
class Groups(Protocol):
    """Endless groups of rows, each over a corpus; the state is that before the next group."""

    def __next__(self) -> tuple[Corpus, list[list[Span]]]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


class FirstFitGroups:
    """Groups of shuffled documents of a corpus, packed first-fit."""

    def __init__(self, corpus: Corpus, config: DataConfig):
        import grain

        self._corpus, self._config = corpus, config
        if len(corpus) == len(corpus.document_starts):
            raise DataError("the train split has no document of two tokens or more to pack")
        documents = grain.MapDataset.range(len(corpus.document_starts))
        if config.shuffle:
            documents = documents.seed(config.seed % 2**32).shuffle()
        self._documents = documents.repeat()
        self._epoch_documents = len(documents)
        self._group = 0

    def __next__(self) -> tuple[Corpus, list[list[Span]]]:
        per_epoch = -(-self._epoch_documents // DOCUMENTS_PER_GROUP)
        epoch, group = divmod(self._group, per_epoch)
        first = group * DOCUMENTS_PER_GROUP
        last = min(first + DOCUMENTS_PER_GROUP, self._epoch_documents)
        offset = epoch * self._epoch_documents
        documents = np.array([self._documents[offset + i] for i in range(first, last)], np.int64)
        rows = first_fit(self._corpus, documents, self._config.sequence_length)
        if self._config.shuffle:  # first-fit fills early rows with many short documents
            rows = shuffled(rows, self._config.seed, self._group)
        self._group += 1
        return self._corpus, rows

    def get_state(self) -> dict[str, Any]:
        return {"group": self._group}

    def set_state(self, state: dict[str, Any]) -> None:
        self._group = int(state["group"])


class GroupedBatches:
    """Batches of the rows of groups; of each global batch, the rows that one process holds.

    Args:
      batch_size: rows of a batch over all processes that share these groups.
      own: the rows of each batch to make.
    """

    def __init__(self, groups: Groups, config: DataConfig, batch_size: int, own: slice):
        self._groups, self._config = groups, config
        self._batch_size, self._own = batch_size, own
        self._start_group()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        chosen = []
        while len(chosen) < self._batch_size:
            taken = self._rows[self._next : self._next + self._batch_size - len(chosen)]
            chosen += [(self._corpus, row) for row in taken]
            self._next += len(taken)
            if self._next == len(self._rows):
                self._start_group()
        config = self._config
        parts = [
            make_batch(corpus, [row], config.sequence_length, config.mask_across_documents)
            for corpus, row in chosen[self._own]
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        return {"groups": self._state, "row": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        self._groups.set_state(state["groups"])
        self._start_group()
        self._next = int(state["row"])

    def _start_group(self) -> None:
        self._state = self._groups.get_state()
        self._corpus, self._rows = next(self._groups)
        self._next = 0


def shuffled(rows: list[list[Span]], seed: int, group: int) -> list[list[Span]]:
    """The rows in an order that depends on the seed and the group."""
    order = np.random.default_rng((seed % 2**32, group)).permutation(len(rows))
    return [rows[i] for i in order]
