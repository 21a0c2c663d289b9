"""Rows of a batch cut from a corpus, and batches made of them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from efficient_lm.data.batch import Batch, empty_batch
from efficient_lm.data.corpus import Corpus

Span = tuple[int, int]  # (start, length) of inputs in the stream; labels lie one further


def make_batch(
    corpus: Corpus,
    rows: Sequence[Sequence[Span]],
    sequence_length: int,
    mask_across_documents: bool,
) -> Batch:
    """The batch whose row b holds the spans `rows[b]` one after another, then padding.

    With `mask_across_documents` each document of a row is a segment with positions from 0, and a
    label that belongs to the next document has weight 0, unless it is the end-of-text token.
    Without, a row is one segment and all its labels count.
    """
    batch = empty_batch(len(rows), sequence_length)
    for b, spans in enumerate(rows):
        place = segment = 0
        for start, length in spans:
            stream = corpus.read(start, start + length + 1)
            count = len(stream) - 1  # less than `length` where the stream ends
            here = slice(place, place + count)
            batch["tokens"][b, here] = stream[:-1]
            batch["labels"][b, here] = stream[1:]
            batch["weights"][b, here] = 1.0
            index = np.arange(count, dtype=np.int32)
            if mask_across_documents:
                starts = corpus.boundaries(start, start + count + 1)
                crossing = starts[starts > 0] - 1  # places whose label starts a document
                if corpus.end_of_text is None:
                    batch["weights"][b, place + crossing] = 0.0
                first = np.zeros(count, np.int32)
                first[0] = 1
                first[starts[starts < count]] = 1
                batch["segment_ids"][b, here] = segment + np.cumsum(first)
                index_of_first = np.maximum.accumulate(index * first)
                batch["positions"][b, here] = index - index_of_first
                segment += int(first.sum())
            else:
                batch["segment_ids"][b, here] = 1
                batch["positions"][b, here] = place + index
            place += count
    return batch


def concat_then_split(corpus: Corpus, sequence_length: int) -> list[list[Span]]:
    """Rows that cut the whole stream in order; the last one may be short."""
    return [[(start, sequence_length)] for start in range(0, len(corpus) - 1, sequence_length)]


def first_fit(
    corpus: Corpus, documents: Int64[np.ndarray, "D"], sequence_length: int
) -> list[list[Span]]:
    """Rows of whole documents: each goes into the first row that has room for it.

    A document longer than a row is cut into rows and a rest. Without an end-of-text token the last
    token of a document is only a label, so that every place of a row predicts something.
    """
    ends = np.append(corpus.document_starts, len(corpus) - (corpus.end_of_text is not None))
    rows: list[list[Span]] = []
    room = np.zeros(0, np.int64)
    for document in documents:
        start, end = int(ends[document]), int(ends[document + 1])
        inputs = end - start - (corpus.end_of_text is None)
        for cut in range(0, inputs, sequence_length):
            length = min(sequence_length, inputs - cut)
            fits = room[: len(rows)] >= length
            row = int(np.argmax(fits)) if fits.any() else len(rows)
            if row == len(rows):
                rows.append([])
                if row == len(room):
                    room = np.append(room, np.full(row + 64, sequence_length))
            rows[row].append((start + cut, length))
            room[row] -= length
    return rows
