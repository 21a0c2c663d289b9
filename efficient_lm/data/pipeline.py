"""Batches for training, endless and resumable, and for evaluation, each token once."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from efficient_lm.config import DataConfig
from efficient_lm.data.corpus import Corpus, build_corpus
from efficient_lm.data.packing import Batch, make_batch
from efficient_lm.data.sources import read_documents
from efficient_lm.data.tokenizers import Tokenizer
from efficient_lm.errors import DataError

# Threads and batches ahead on the host; the device is kept ahead by `prefetch_to_device`.
HOST_THREADS = 1
HOST_PREFETCH = 2


@runtime_checkable
class BatchIterator(Protocol):
    """Endless batches; `get_state` is JSON-able and `set_state` goes on from it exactly."""

    def __iter__(self) -> "BatchIterator": ...
    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def make_train_iterator(
    config: DataConfig, tokenizer: Tokenizer, *, process_index: int = 0, process_count: int = 1
) -> BatchIterator:
    """Endless training batches, reshuffled in every epoch by `config.seed`.

    Process p of P gets rows [p * B/P, (p + 1) * B/P) of each global batch of B = batch_size rows:
    what the processes see together does not depend on P, and a state fits any P.

    concat_then_split cuts the whole split into windows of `sequence_length`, at another offset in
    each epoch, and shuffles the windows.

    Raises:
      DataError: no or unreadable data, a split shorter than a sequence, or a batch that the
        processes cannot share evenly.
    """
    local = _rows_per_process(config.batch_size, process_count, "config.data.batch_size")
    corpus = load_corpus(config, "train", tokenizer)
    return _window_batches(config, corpus, local, process_index, process_count)


def load_corpus(config: DataConfig, split: str, tokenizer: Tokenizer) -> Corpus:
    """The tokens of a split."""
    return build_corpus(read_documents(config, split), tokenizer, f"the {split} split")


def _window_batches(config: DataConfig, corpus: Corpus, local: int, index: int, count: int):
    """Shuffled windows of the stream; an element of the dataset is where a window starts."""
    import grain  # costs 0.3 s to import

    length = config.sequence_length
    windows, slack = divmod(len(corpus) - 1, length)
    if windows < 1:
        raise DataError(
            f"the train split has {len(corpus)} tokens; config.data.sequence_length={length} needs "
            f"at least {length + 1}"
        )
    if config.shuffle and windows > 1:  # one window less leaves room for any offset
        windows, slack = windows - 1, slack + length

    def start(row: int, window: int) -> np.int64:
        if not config.shuffle:
            return np.int64(window * length)
        epoch = row // windows
        offset = np.random.default_rng((config.seed % 2**32, epoch)).integers(slack + 1)
        return np.int64(offset + window * length)

    dataset = grain.MapDataset.range(windows)
    if config.shuffle:
        dataset = dataset.seed(config.seed % 2**32).shuffle()
    dataset = dataset.repeat().map_with_index(start).batch(local, drop_remainder=True)[index::count]
    dataset = dataset.map(
        lambda starts: make_batch(
            corpus, [[(int(s), length)] for s in starts], length, config.mask_across_documents
        )
    )
    options = grain.ReadOptions(num_threads=HOST_THREADS, prefetch_buffer_size=HOST_PREFETCH)
    return iter(dataset.to_iter_dataset(options))


class EvaluationBatches:
    """Batches in which every token of a split is scored once; can be iterated again and again.

    Attributes:
      scored_tokens: sum of the weights over all processes' batches.
    """

    def __init__(self, corpus: Corpus, config: DataConfig, *, batch_size: int, stride: int,
                 limit: int | None, process_index: int, process_count: int):  # fmt: skip
        self._local = _rows_per_process(batch_size, process_count, "the evaluation batch size")
        self._process_index, self._process_count = process_index, process_count
        self._corpus, self._config, self._stride = corpus, config, stride
        length = config.sequence_length
        if len(corpus) < 2:
            raise DataError(f"the split has {len(corpus)} token(s); at least 2 are needed to score")
        # The first window scores all its labels, each further one the last `stride` of its own.
        windows = 1 + max(0, -(-(len(corpus) - 1 - length) // stride))
        self._windows = np.arange(windows)
        batches = -(-windows // batch_size)
        if limit is not None and limit < batches:  # spread over the split, not its beginning
            self._windows = np.arange(limit * batch_size) * windows // (limit * batch_size)
            batches = limit
        self._batches = batches

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        length, stride = self._config.sequence_length, self._stride
        for number in range(self._batches):
            first = (number * self._process_count + self._process_index) * self._local
            windows = self._windows[first : first + self._local]
            rows = [[(int(w) * stride, length)] for w in windows]
            rows += [[]] * (self._local - len(rows))
            batch = make_batch(self._corpus, rows, length, self._config.mask_across_documents)
            for row, window in enumerate(windows):
                if window > 0:
                    batch["weights"][row, : length - stride] = 0.0
            yield batch


def make_evaluation_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: str = "valid",
    *,
    batch_size: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> EvaluationBatches:
    """Batches in which every token of `split` is scored exactly once (weight 1).

    Windows of `sequence_length` tokens advance by `stride`; with a stride below the length they
    overlap and only the new labels of a window have weight 1 (sliding context). The last batch is
    padded to full shape. A token without context cannot be scored: the first token of the split,
    and with `mask_across_documents` the first token of each document, count neither in the loss nor
    in the bytes, unless the tokenizer has an end-of-text token, which then precedes and ends every
    document; then only the very first end-of-text is not scored.

    Args:
      batch_size: rows over all processes; None: config.batch_size.
      stride: tokens scored a window, 1 to sequence_length; None: sequence_length.
      limit: at most this many batches, their windows spread evenly over the split.
    """
    stride = config.sequence_length if stride is None else stride
    if not 1 <= stride <= config.sequence_length:
        raise DataError(
            f"stride={stride}; allowed: 1 to config.data.sequence_length={config.sequence_length}"
        )
    return EvaluationBatches(
        load_corpus(config, split, tokenizer),
        config,
        batch_size=config.batch_size if batch_size is None else batch_size,
        stride=stride,
        limit=limit,
        process_index=process_index,
        process_count=process_count,
    )


def _rows_per_process(rows: int, process_count: int, what: str) -> int:
    if rows % process_count:
        raise DataError(f"{what}={rows} is not divisible by the {process_count} processes")
    return rows // process_count
