"""The tokens of a split as one long stream that knows where its documents start."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from efficient_lm.data.tokenizers import Tokenizer
from efficient_lm.errors import DataError


@dataclass(frozen=True)
class Corpus:
    """Documents one after another in one stream of tokens.

    With an `end_of_text` token each document begins with it and the stream ends with one more, so
    that it is both the context of a document's first token and the label of its last.

    Attributes:
      pieces: arrays of tokens (any integer dtype, memory-mapped or not) that follow each other.
      document_starts: int64 [D], offset of each document in the stream, ascending from 0.
      end_of_text: id of the token that separates documents, or None.
    """

    pieces: tuple[np.ndarray, ...]
    document_starts: Int64[np.ndarray, "D"]
    end_of_text: int | None = None

    def __post_init__(self):
        ends = np.cumsum([0] + [len(piece) for piece in self.pieces])
        object.__setattr__(self, "_piece_starts", ends)

    def __len__(self) -> int:
        return int(self._piece_starts[-1])

    def read(self, start: int, stop: int) -> Int32[np.ndarray, "T"]:
        """Tokens [start, stop) of the stream; fewer where the stream ends."""
        first = int(np.searchsorted(self._piece_starts, start, side="right")) - 1
        parts = []
        for piece, offset in zip(self.pieces[first:], self._piece_starts[first:-1], strict=True):
            if offset >= stop:
                break
            parts.append(piece[max(start - offset, 0) : stop - offset])
        if len(parts) == 1:
            return parts[0].astype(np.int32)
        return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)

    def boundaries(self, start: int, stop: int) -> Int64[np.ndarray, "_"]:
        """Document starts within [start, stop), counted from `start`."""
        low, high = np.searchsorted(self.document_starts, (start, stop))
        return self.document_starts[low:high] - start


def build_corpus(documents: Iterable[str], tokenizer: Tokenizer, what: str) -> Corpus:
    """Tokenise documents into memory, in the smallest dtype that holds the vocabulary.

    Args:
      documents: texts; empty ones are left out.
      tokenizer: whose `end_of_text`, if any, goes before each document.
      what: name of the text for the DataError raised when no token is left.
    """
    dtype = np.min_scalar_type(tokenizer.vocabulary_size - 1)
    end = tokenizer.end_of_text
    separator = np.array([] if end is None else [end], dtype)
    pieces, starts, length = [], [], 0
    for tokens in encode_documents(documents, tokenizer):
        if len(tokens):
            starts.append(length)
            pieces += [separator, tokens.astype(dtype)]
            length += len(separator) + len(tokens)
    if not starts:
        raise DataError(f"{what} has no text; give other paths")
    stream = np.concatenate([*pieces, separator])
    return Corpus((stream,), np.array(starts, np.int64), end)


def encode_documents(documents: Iterable[str], tokenizer: Tokenizer, group_characters: int = 2**22):
    """Token arrays of documents, encoded in groups so that tokenizers can use several threads."""
    group: list[str] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= group_characters:
            yield from tokenizer.encode_batch(group)
            group, size = [], 0
    yield from tokenizer.encode_batch(group)
