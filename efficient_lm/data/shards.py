"""Token shards: files of tokens that are read through a memory map.

A shard is little-endian: a header of 64 bytes, the tokens (uint16 or uint32, padded to 8 bytes),
and the offset of each document's first token (int64). With an end-of-text token each document
begins with it.
"""

import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from efficient_lm.config import DataConfig
from efficient_lm.data.corpus import Corpus
from efficient_lm.data.sources import find_files, split_by_hash
from efficient_lm.data.tokenizers import Tokenizer
from efficient_lm.errors import DataError

MAGIC = b"ELMTOKEN"
VERSION = 1
HEADER_BYTES = 64
_FIELDS = struct.Struct("<8sIIQQQq")  # magic, version, bytes a token, V, tokens, documents, end
_CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class TokenShard:
    """A shard that is open for reading.

    Attributes:
      tokens: uint16 or uint32 [N], memory-mapped.
      document_starts: int64 [D], memory-mapped, ascending from 0.
      vocabulary_size: of the tokenizer that wrote it.
      end_of_text: id of the token before each document, or None.
    """

    path: Path
    tokens: np.ndarray
    document_starts: np.ndarray
    vocabulary_size: int
    end_of_text: int | None


def write_token_shard(
    path: str | Path,
    documents: Iterable[np.ndarray],
    *,
    vocabulary_size: int,
    end_of_text: int | None = None,
) -> int:
    """Write documents (token ids, without end-of-text) to a shard; returns the tokens written.

    The file appears under its name only when it is complete.

    Raises:
      DataError: an id is outside the vocabulary, or the file cannot be written (full disk, ...).
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            count = _write(file, documents, vocabulary_size, end_of_text, path)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return count


def _write(file, documents, vocabulary_size: int, end_of_text: int | None, path: Path) -> int:
    """Write header, tokens and document offsets; returns the number of tokens."""
    dtype = np.dtype("<u2" if vocabulary_size <= 2**16 else "<u4")
    starts, count = [], 0
    file.write(bytes(HEADER_BYTES))
    for document in documents:
        ids = np.asarray(document)
        if not len(ids):
            continue
        for bad in (ids.min(), ids.max()):
            if not 0 <= bad < vocabulary_size:
                raise DataError(
                    f"{path}: token id {bad} is outside the vocabulary of {vocabulary_size}"
                )
        ids = ids.astype(dtype)
        if end_of_text is not None:
            ids = np.insert(ids, 0, end_of_text)
        starts.append(count)
        count += len(ids)
        file.write(ids.tobytes())
    file.write(bytes(-count * dtype.itemsize % 8))
    file.write(np.array(starts, "<i8").tobytes())
    end = -1 if end_of_text is None else end_of_text
    fields = _FIELDS.pack(MAGIC, VERSION, dtype.itemsize, vocabulary_size, count, len(starts), end)
    file.seek(0)
    file.write(fields + _CHECKSUM.pack(zlib.crc32(fields)))
    return count


def read_token_shard(path: str | Path) -> TokenShard:
    """Open a shard; DataError naming the file if it is no shard, damaged, truncated or empty."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
        raise DataError(
            f"{path} is not a token shard (no header); write shards with "
            "python -m efficient_lm.data.write_shards"
        )
    fields = header[: _FIELDS.size]
    _, version, width, vocabulary_size, count, documents, end = _FIELDS.unpack(fields)
    if version != VERSION:
        raise DataError(f"{path} is a token shard of version {version}; known: {VERSION}")
    checksum = _CHECKSUM.unpack_from(header, _FIELDS.size)[0]
    if checksum != zlib.crc32(fields) or width not in (2, 4):
        raise DataError(f"{path} has a damaged header; write the shard again")
    starts_at = HEADER_BYTES + count * width + -count * width % 8
    if size != starts_at + 8 * documents:
        raise DataError(
            f"{path} has {size} bytes, its header promises {starts_at + 8 * documents}: the file "
            "is truncated or damaged; copy or write it again"
        )
    if not count:
        raise DataError(f"{path} holds no tokens")
    tokens = np.memmap(path, f"<u{width}", mode="r", offset=HEADER_BYTES, shape=(count,))
    starts = np.memmap(path, "<i8", mode="r", offset=starts_at, shape=(documents,))
    if starts[0] != 0 or starts[-1] >= count or (np.diff(starts) <= 0).any():
        raise DataError(f"{path} has damaged document offsets; write the shard again")
    return TokenShard(path, tokens, starts, vocabulary_size, None if end < 0 else end)


def corpus_of_shards(paths: Sequence[Path], tokenizer: Tokenizer) -> Corpus:
    """Shards one after another; DataError where one was written with another tokenizer."""
    pieces, starts, offset = [], [], 0
    for path in paths:
        shard = read_token_shard(path)
        if shard.vocabulary_size > tokenizer.vocabulary_size:
            raise DataError(
                f"{path} was written with a vocabulary of {shard.vocabulary_size}, the tokenizer "
                f"has {tokenizer.vocabulary_size}; set config.data.tokenizer to the shards' own"
            )
        if shard.end_of_text != tokenizer.end_of_text:
            raise DataError(
                f"{path} was written with end-of-text token {shard.end_of_text}, the tokenizer has "
                f"{tokenizer.end_of_text}; set config.data.tokenizer to the shards' own"
            )
        pieces.append(shard.tokens)
        starts.append(np.asarray(shard.document_starts, np.int64) + offset)
        offset += len(shard.tokens)
    return with_final_end_of_text(pieces, np.concatenate(starts), tokenizer.end_of_text)


def with_final_end_of_text(pieces, document_starts, end_of_text: int | None) -> Corpus:
    """The corpus of `pieces`, closed by the end-of-text token if there is one."""
    closing = () if end_of_text is None else (np.array([end_of_text], np.int32),)
    return Corpus((*pieces, *closing), document_starts, end_of_text)


def cut_corpus(corpus: Corpus, split: str, fraction: float) -> Corpus:
    """The first 1 - `fraction` of the tokens for "train", the others for "valid".

    Cut at the start of a document, or within it where there is only one.
    """
    closing = corpus.end_of_text is not None
    total = len(corpus) - closing
    cut = int(total * (1 - fraction))
    if len(corpus.document_starts) > 1:
        nearest = np.abs(corpus.document_starts[1:] - cut).argmin() + 1
        cut = int(corpus.document_starts[nearest])
    low, high = (0, cut) if split == "train" else (cut, total)
    if low == high:
        raise DataError(
            f"nothing is left for the {split} split of {total} tokens at "
            f"config.data.valid_fraction={fraction}"
        )
    pieces, offset = [], 0
    for piece in corpus.pieces[: len(corpus.pieces) - closing]:
        pieces.append(piece[max(low - offset, 0) : max(high - offset, 0)])
        offset += len(piece)
    starts = corpus.document_starts
    starts = np.unique(np.append(low, starts[(starts >= low) & (starts < high)])) - low
    return with_final_end_of_text(pieces, starts.astype(np.int64), corpus.end_of_text)


def load_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> Corpus:
    """The shards of a split: `valid_paths`, or shards by a hash of their path, or a single one cut.

    Raises:
      DataError: naming a shard that is damaged or was written with another tokenizer.
    """
    paths = config.valid_paths if config.valid_paths and split == "valid" else config.paths
    files = find_files(paths, (".bin",))
    if config.valid_paths:
        return corpus_of_shards(list(files.values()), tokenizer)
    if len(files) == 1:
        corpus = corpus_of_shards(list(files.values()), tokenizer)
        return cut_corpus(corpus, split, config.valid_fraction)
    files = split_by_hash(files, split, config.valid_fraction)
    return corpus_of_shards(list(files.values()), tokenizer)
