"""Rows of a batch cut from a corpus, and batches made of them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int32

from efficient_lm.data.corpus import Corpus

# tokens, labels, segment_ids, positions int32 [B, T]; weights float32 [B, T]
Batch = dict[str, Int32[np.ndarray, "B T"] | Float32[np.ndarray, "B T"]]
Span = tuple[int, int]  # (start, length) of inputs in the stream; labels lie one further


def empty_batch(rows: int, sequence_length: int) -> Batch:
    """A batch of padding: segment ids and weights 0."""
    shape = (rows, sequence_length)
    names = ("tokens", "labels", "segment_ids", "positions")
    batch: Batch = {name: np.zeros(shape, np.int32) for name in names}
    batch["weights"] = np.zeros(shape, np.float32)
    return batch


def make_batch(
    corpus: Corpus,
    rows: Sequence[Sequence[Span]],
    sequence_length: int,
    mask_across_documents: bool,
) -> Batch:
    """The batch whose row b holds the spans `rows[b]` one after another, then padding.

    With `mask_across_documents` each document of a row is a segment with positions from 0, and a
    label that belongs to the next document has weight 0, unless it is the end-of-text token.
    Without, a row is one segment, and only a label past the end of a span that is followed by
    something else has weight 0.
    """
    batch = empty_batch(len(rows), sequence_length)
    for b, spans in enumerate(rows):
        place = 0
        segment = 0
        for start, length in spans:
            stream = corpus.read(start, start + length + 1)
            count = min(length, len(stream))
            labels = stream[1:]
            here = slice(place, place + count)
            batch["tokens"][b, here] = stream[:count]
            batch["labels"][b, place : place + len(labels)] = labels
            batch["weights"][b, place : place + len(labels)] = 1.0

            starts = corpus.boundaries(start, start + len(stream))
            crossing = starts[starts > 0] - 1  # places in the span whose label starts a document
            crossing = crossing[
                labels[crossing] != (-1 if corpus.end_of_text is None else corpus.end_of_text)
            ]
            if not mask_across_documents:
                crossing = crossing[(crossing == length - 1) & (place + length < sequence_length)]
            batch["weights"][b, place + crossing] = 0.0

            if mask_across_documents:
                new = np.zeros(count, np.int32)
                new[0] = 1
                new[starts[starts < count]] = 1
                index = np.arange(count, dtype=np.int32)
                batch["segment_ids"][b, here] = segment + np.cumsum(new, dtype=np.int32)
                batch["positions"][b, here] = index - np.maximum.accumulate(index * new)
                segment += int(new.sum())
            else:
                batch["segment_ids"][b, here] = 1
                batch["positions"][b, here] = np.arange(place, place + count)
            place += count
    return batch
