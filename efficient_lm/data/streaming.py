"""Hugging Face `datasets`, streamed: documents are read, tokenised and packed group by group."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from efficient_lm.config import DataConfig
from efficient_lm.data.corpus import Corpus, build_corpus
from efficient_lm.data.groups import shuffled
from efficient_lm.data.packing import Span, concat_then_split, first_fit
from efficient_lm.data.records import import_extra
from efficient_lm.data.sources import hash_fraction
from efficient_lm.data.tokenizers import Tokenizer
from efficient_lm.errors import DataError

DOCUMENTS_PER_GROUP = 1024
VALID_DOCUMENTS = 1000  # a stream has no end worth waiting for


def open_stream(paths: tuple, default_split: str, process_index: int = 0, process_count: int = 1):
    """The rows of one process of (name, subset, split), as a `datasets.IterableDataset`.

    Subset and split may be left out, an empty subset is none. The name is one of the Hugging Face
    hub or a folder of data files.
    """
    datasets = import_extra("datasets")
    distributed = import_extra("datasets.distributed")
    if not 1 <= len(paths) <= 3:
        raise DataError(
            f"config.data.paths={paths!r}; for source='hugging_face' give (name,), (name, subset) "
            "or (name, subset, split)"
        )
    name, subset, split = (*paths, "", "")[:3]
    split = split or default_split
    try:
        stream = datasets.load_dataset(name, subset or None, split=split, streaming=True)
    except Exception as error:  # the library raises many kinds, from many layers
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot open dataset {name!r} ({split}): {reason}") from error
    return distributed.split_dataset_by_node(stream, process_index, process_count)


def read_documents(config: DataConfig, split: str) -> Iterator[str]:
    """Texts of a split, once through the stream.

    Validation is `config.valid_paths` (its split "validation" unless it says otherwise), or else
    the texts of the training stream whose hash is below `valid_fraction`, which training leaves
    out; of either the first VALID_DOCUMENTS only.
    """
    if split == "valid" and config.valid_paths:
        stream = open_stream(config.valid_paths, "validation")
        texts = (_text(row, config) for row in stream)
    else:
        texts = (_text(row, config) for row in open_stream(config.paths, "train"))
        texts = (text for text in texts if _belongs(text, split, config))
    return itertools.islice(texts, VALID_DOCUMENTS) if split == "valid" else texts


class StreamGroups:
    """Groups of documents in the order of the stream; rows are shuffled within a group.

    Each process reads and packs documents of its own, so that a state fits the process count it
    was made with only.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, process_index: int, process_count: int
    ):
        self._config, self._tokenizer, self._processes = config, tokenizer, process_count
        self._stream = open_stream(config.paths, "train", process_index, process_count)
        self._epoch = self._group = 0
        self._rows = iter(self._stream)

    def __next__(self) -> tuple[Corpus, list[list[Span]]]:
        empty_epoch = False
        while True:
            rows = list(itertools.islice(self._rows, DOCUMENTS_PER_GROUP))
            texts = [_text(row, self._config) for row in rows]
            texts = [text for text in texts if text and _belongs(text, "train", self._config)]
            corpus, packed = self._pack(texts) if texts else (None, [])
            if packed:
                self._group += 1
                return corpus, packed
            if not rows:
                if empty_epoch:
                    raise DataError(f"{self._config.paths[0]!r} has no text to train on")
                empty_epoch = True
                self._epoch += 1
                self._stream.set_epoch(self._epoch)
                self._rows = iter(self._stream)

    def _pack(self, texts: list[str]) -> tuple[Corpus, list[list[Span]]]:
        config = self._config
        corpus = build_corpus(texts, self._tokenizer, f"{config.paths[0]!r}")
        if config.packing == "first_fit":
            documents = np.arange(len(corpus.document_starts))
            packed = first_fit(corpus, documents, config.sequence_length)
        else:
            packed = concat_then_split(corpus, config.sequence_length)
        return corpus, shuffled(packed, config.seed, self._group) if config.shuffle else packed

    def get_state(self) -> dict[str, Any]:
        stream = self._stream.state_dict()
        return {"group": self._group, "epoch": self._epoch, "stream": stream,
                "processes": self._processes}  # fmt: skip

    def set_state(self, state: dict[str, Any]) -> None:
        if state["processes"] != self._processes:
            raise DataError(
                f"this state of a streamed dataset is of {state['processes']} processes, now there "
                f"are {self._processes}; use token shards to change the number of processes"
            )
        self._group, self._epoch = int(state["group"]), int(state["epoch"])
        self._stream.set_epoch(self._epoch)
        self._stream.load_state_dict(state["stream"])
        self._rows = iter(self._stream)


def _text(row: dict[str, Any], config: DataConfig) -> str:
    text = row.get(config.text_field)
    if not isinstance(text, str):
        raise DataError(
            f"a row of {config.paths[0]!r} has no text field {config.text_field!r} "
            f"(config.data.text_field); its fields: {', '.join(row)}"
        )
    return text


def _belongs(text: str, split: str, config: DataConfig) -> bool:
    if config.valid_paths:
        return split == "train"
    return (hash_fraction(text) < config.valid_fraction) == (split == "valid")
