"""Batches for training, endless and resumable, and for evaluation, each token once."""

import functools
from collections.abc import Iterator

import numpy as np

from efficient_lm.config import DataConfig
from efficient_lm.data import shards, sources, streaming, synthetic
from efficient_lm.data.corpus import Corpus, build_corpus
from efficient_lm.data.evaluation import EvaluationBatches, TaskBatches
from efficient_lm.data.groups import FirstFitGroups, GroupedBatches
from efficient_lm.data.packing import make_batch
from efficient_lm.data.prefetch import BatchIterator, HostIterator, in_thread
from efficient_lm.data.tokenizers import Tokenizer
from efficient_lm.errors import DataError

HOST_PREFETCH = 2  # batches made ahead by a thread; the device is kept ahead on its own


def make_train_iterator(
    config: DataConfig, tokenizer: Tokenizer, *, process_index: int = 0, process_count: int = 1
) -> BatchIterator:
    """Endless training batches, reshuffled in every epoch by `config.seed`.

    Process p of P gets rows [p * B/P, (p + 1) * B/P) of each global batch of B = batch_size rows:
    what the processes see together does not depend on P, and a state fits any P. (Streams of
    `hugging_face` are the exception: there each process packs documents of its own.)

    concat_then_split cuts the whole split into windows of `sequence_length`, at another offset in
    each epoch, and shuffles the windows. first_fit shuffles the documents and packs them whole.

    Raises:
      DataError: no or unreadable data, a split shorter than a sequence, or a batch that the
        processes cannot share evenly.
      ConfigError: options of a synthetic task that do not fit.
    """
    local = rows_per_process(config.batch_size, process_count, "config.data.batch_size")
    if config.source in synthetic.TASKS:
        dataset = _task_batches(config, local, process_index, process_count)
        return HostIterator(dataset, config.source)
    kind = f"{config.source}, {config.packing}"
    if config.source == "hugging_face":
        groups = functools.partial(
            streaming.StreamGroups, config, tokenizer, process_index, process_count
        )
        return HostIterator(_grouped_batches(groups, config, local, slice(None)), kind)
    corpus = load_corpus(config, "train", tokenizer)
    if config.packing == "first_fit":
        own = slice(process_index * local, (process_index + 1) * local)
        groups = functools.partial(FirstFitGroups, corpus, config)
        return HostIterator(_grouped_batches(groups, config, config.batch_size, own), kind)
    return HostIterator(_window_batches(config, corpus, local, process_index, process_count), kind)


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
) -> EvaluationBatches | TaskBatches:
    """Batches in which every token of `split` is scored exactly once (weight 1).

    Windows of `sequence_length` tokens advance by `stride`; with a stride below the length they
    overlap and only the new labels of a window have weight 1 (sliding context). The last batch is
    padded to full shape. A token without context cannot be scored: the first token of the split,
    and with `mask_across_documents` the first token of each document, count neither in the loss nor
    in the bytes, unless the tokenizer has an end-of-text token, which then precedes and ends every
    document; then only the very first end-of-text is not scored.

    A synthetic task has the answers of its `valid_rows` rows instead; `stride` has no effect.

    Args:
      batch_size: rows over all processes; None: config.batch_size.
      stride: tokens scored a window, 1 to sequence_length; None: sequence_length.
      limit: at most this many batches, their windows spread evenly over the split.

    Returns an iterable with a length, which can be iterated again and again.
    """
    stride = config.sequence_length if stride is None else stride
    if not 1 <= stride <= config.sequence_length:
        raise DataError(
            f"stride={stride}; allowed: 1 to config.data.sequence_length={config.sequence_length}"
        )
    batch_size = config.batch_size if batch_size is None else batch_size
    local = rows_per_process(batch_size, process_count, "the evaluation batch size")
    process = {"local": local, "process_index": process_index, "process_count": process_count}
    if config.source in synthetic.TASKS:
        return TaskBatches(config, split, limit=limit, **process)
    corpus = load_corpus(config, split, tokenizer)
    return EvaluationBatches(corpus, config, stride=stride, limit=limit, **process)


def load_corpus(config: DataConfig, split: str, tokenizer: Tokenizer) -> Corpus:
    """All tokens of a split: tokenised into memory, or memory-mapped for `tokens`."""
    if config.source == "tokens":
        return shards.load_split(config, split, tokenizer)
    if config.source == "hugging_face" and split != "valid":
        raise DataError("a hugging_face stream can be trained on, not loaded or evaluated")
    return build_corpus(read_documents(config, split), tokenizer, f"the {split} split")


def read_documents(config: DataConfig, split: str) -> Iterator[str]:
    """Texts of a split of any source that has texts; a stream is read once through."""
    if config.source == "hugging_face":
        return streaming.read_documents(config, split)
    return sources.read_documents(config, split)


def rows_per_process(rows: int, process_count: int, what: str) -> int:
    """Rows of a batch that each process holds; DataError where they do not come out even."""
    if rows % process_count:
        raise DataError(f"{what}={rows} is not divisible by the {process_count} processes")
    return rows // process_count


def _grouped_batches(make_groups, config: DataConfig, batch_size: int, own: slice):
    """Rows that are packed group by group, in a thread."""
    return in_thread(lambda: GroupedBatches(make_groups(), config, batch_size, own), HOST_PREFETCH)


def _task_batches(config: DataConfig, local: int, index: int, count: int):
    """Rows 0, 1, 2, ... of a synthetic task, never repeated."""
    import grain  # costs 0.3 s to import

    task = synthetic.make_task(config)
    dataset = grain.MapDataset.range(2**48).batch(local, drop_remainder=True)[index::count]
    return _read_ahead(dataset.map(lambda numbers: task.batch(config, "train", numbers)))


def _window_batches(config: DataConfig, corpus: Corpus, local: int, index: int, count: int):
    """Shuffled windows of the stream; an element of the dataset is where a window starts."""
    import grain

    length = config.sequence_length
    windows, slack = divmod(len(corpus) - 1, length)
    if windows < 1:
        raise DataError(
            f"the train split has {len(corpus)} tokens; config.data.sequence_length={length} needs "
            f"at least {length + 1}"
        )
    if config.shuffle and windows > 1:  # one window less leaves room for any offset
        windows, slack = windows - 1, slack + length

    @functools.lru_cache(maxsize=4)  # a batch may touch two epochs
    def offset(epoch: int) -> int:
        generator = np.random.default_rng((config.seed % 2**32, epoch))
        return int(generator.integers(slack + 1)) if config.shuffle else 0

    dataset = grain.MapDataset.range(windows)
    if config.shuffle:
        dataset = dataset.seed(config.seed % 2**32).shuffle()
    dataset = dataset.repeat().map_with_index(
        lambda row, window: np.int64(offset(row // windows) + window * length)
    )
    dataset = dataset.batch(local, drop_remainder=True)[index::count]

    def batch(starts):
        rows = [[(int(start), length)] for start in starts]
        return make_batch(corpus, rows, length, config.mask_across_documents)

    return _read_ahead(dataset.map(batch))


def _read_ahead(dataset):
    import grain

    return dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=HOST_PREFETCH)
    )
