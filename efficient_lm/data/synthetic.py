"""Synthetic tasks with exact scores: associative recall, copying, induction heads, needles.

A row depends on the seed and its number alone. Only answers have weight 1: at such a place the
model must predict the label from the tokens up to there.
"""

import abc
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from efficient_lm.config import DataConfig
from efficient_lm.data.batch import Batch, empty_batch
from efficient_lm.errors import ConfigError
from efficient_lm.fields import build

STREAMS = {"train": 0, "valid": 1}  # splits draw from random streams of their own


class Row(NamedTuple):
    """Tokens of a row, and the answers that belong behind those at `places` (ascending)."""

    tokens: Int[np.ndarray, "n"]
    places: Int[np.ndarray, "queries"]
    answers: Int[np.ndarray, "queries"]


@dataclass(frozen=True)
class Task(abc.ABC):
    """A task and its options. Subclasses also have `vocabulary_size` among them."""

    valid_rows: int = 1024  # rows of the validation split

    @abc.abstractmethod
    def problem(self, length: int) -> str | None:
        """What is wrong with the options for rows of `length` tokens, or None."""

    @abc.abstractmethod
    def row(self, rng: np.random.Generator, length: int) -> Row:
        """A row of at most `length` tokens."""

    def batch(self, config: DataConfig, split: str, numbers: Int[np.ndarray, "B"]) -> Batch:
        """The rows of these numbers, padded to `config.sequence_length`."""
        batch = empty_batch(len(numbers), config.sequence_length)
        for b, number in enumerate(numbers):
            rng = np.random.default_rng((config.seed % 2**32, STREAMS[split], int(number)))
            tokens, places, answers = self.row(rng, config.sequence_length)
            length = len(tokens)
            batch["tokens"][b, :length] = tokens
            batch["labels"][b, : length - 1] = tokens[1:]
            batch["labels"][b, places] = answers
            batch["weights"][b, places] = 1.0
            batch["segment_ids"][b, :length] = 1
            batch["positions"][b, :length] = np.arange(length)
        return batch


@dataclass(frozen=True)
class AssociativeRecall(Task):
    """Multi-query associative recall (MQAR; Arora et al. 2023, Zoology, section 3).

    `pairs` keys and values k1 v1 k2 v2 ..., then each key once more at a place drawn from a power
    law over the rest of the row; the answer after it is its value. Keys are from the lower half of
    the vocabulary, values from the upper. As in the authors' generator the answer is only a label:
    the token that follows a query is filler.
    """

    vocabulary_size: int = 8192
    pairs: int = 8
    power: float = 0.01  # of the law for query places; smaller: nearer to the pairs
    filler: Literal["random", "zero"] = "random"  # tokens between the queries

    def problem(self, length: int) -> str | None:
        if self.pairs < 1 or 4 * self.pairs > length:
            return f"pairs={self.pairs}; allowed: 1 to a quarter of sequence_length={length}"
        if self.vocabulary_size // 2 <= self.pairs:
            return f"vocabulary_size={self.vocabulary_size}; it must exceed 2 * pairs + 1"
        return None if self.power > 0 else f"power={self.power}; it must be above 0"

    def row(self, rng: np.random.Generator, length: int) -> Row:
        half, context = self.vocabulary_size // 2, 2 * self.pairs
        keys = 1 + rng.choice(half - 1, self.pairs, replace=False)
        values = half + rng.choice(self.vocabulary_size - half, self.pairs, replace=False)
        places = (length - context) // 2
        law = self.power * np.arange(1, places + 1, dtype=np.float64) ** (self.power - 1)
        queries = context + 2 * rng.choice(places, self.pairs, replace=False, p=law / law.sum())
        tokens = np.zeros(length, np.int64)
        if self.filler == "random":
            tokens = rng.integers(self.vocabulary_size, size=length)
        tokens[0:context:2], tokens[1:context:2], tokens[queries] = keys, values, keys
        order = np.argsort(queries)
        return Row(tokens, queries[order], values[order])


@dataclass(frozen=True)
class Copying(Task):
    """Copy a random string: its symbols, a separator (token 0), and the symbols once more.

    Lengths are drawn from [min_symbols, max_symbols] (Jelassi et al. 2024, Repeat After Me).
    """

    vocabulary_size: int = 32
    min_symbols: int | None = None  # None: max_symbols
    max_symbols: int | None = None  # None: half of sequence_length

    def problem(self, length: int) -> str | None:
        low, high = self._range(length)
        if not 1 <= low <= high <= length // 2:
            return (
                f"min_symbols={low}, max_symbols={high}; allowed: 1 <= min_symbols <= max_symbols "
                f"<= half of sequence_length={length}"
            )
        return None if self.vocabulary_size > 2 else "vocabulary_size must be at least 3"

    def row(self, rng: np.random.Generator, length: int) -> Row:
        low, high = self._range(length)
        count = int(rng.integers(low, high + 1))
        symbols = rng.integers(1, self.vocabulary_size, size=count)
        tokens = np.concatenate([symbols, [0], symbols[:-1]])
        return Row(tokens, np.arange(count, 2 * count), symbols)

    def _range(self, length: int) -> tuple[int, int]:
        high = length // 2 if self.max_symbols is None else self.max_symbols
        return (high if self.min_symbols is None else self.min_symbols), high


@dataclass(frozen=True)
class Induction(Task):
    """Induction head (Olsson et al. 2022; the row of Gu and Dao 2023, Mamba, section 4.1.2).

    Random tokens with a marker, the last token of the vocabulary, at a random place and at the end
    of the row; the answer is the token that followed the first marker.
    """

    vocabulary_size: int = 16

    def problem(self, length: int) -> str | None:
        if self.vocabulary_size < 3:
            return f"vocabulary_size={self.vocabulary_size}; it must be at least 3"
        return None if length >= 3 else f"sequence_length={length}; it must be at least 3"

    def row(self, rng: np.random.Generator, length: int) -> Row:
        marker = self.vocabulary_size - 1
        tokens = rng.integers(marker, size=length)
        place = int(rng.integers(length - 2))
        tokens[[place, -1]] = marker
        return Row(tokens, np.array([length - 1]), tokens[place + 1 : place + 2])


@dataclass(frozen=True)
class Needle(Task):
    """Needles in a haystack: find the value that stands behind a key somewhere in filler.

    The vocabulary has the marks "needle" (0) and "question" (1), then keys, values and filler in
    equal shares. A needle is its mark, a key and `value_length` value tokens; the row ends with the
    question mark, the key asked for and its value but for the last token, so that each value token
    is an answer.
    """

    vocabulary_size: int = 256
    needles: int = 1  # one is asked for, the others distract
    value_length: int = 1
    depth: float | None = None  # place of the asked needle, 0: beginning, 1: end; None: random

    def problem(self, length: int) -> str | None:
        if self.needles < 1 or self.value_length < 1:
            return f"needles={self.needles}, value_length={self.value_length}; allowed: at least 1"
        if self.needles > self._share():
            return (
                f"needles={self.needles} exceeds the {self._share()} keys of vocabulary_size="
                f"{self.vocabulary_size}"
            )
        needed = self.needles * (2 + self.value_length) + 1 + self.value_length
        if needed > length:
            return f"the needles and the question take {needed} tokens of sequence_length={length}"
        if self.depth is not None and not 0 <= self.depth <= 1:
            return f"depth={self.depth}; allowed: 0 to 1"
        return None

    def row(self, rng: np.random.Generator, length: int) -> Row:
        share, size = self._share(), 2 + self.value_length
        keys = 2 + rng.choice(share, self.needles, replace=False)
        values = 2 + share + rng.integers(share, size=(self.needles, self.value_length))
        question = length - (1 + self.value_length)
        tokens = rng.integers(2 + 2 * share, self.vocabulary_size, size=length)
        # Places among the filler, then among all tokens: needles never overlap.
        filler = question - self.needles * size
        slots = rng.integers(filler + 1, size=self.needles)
        if self.depth is not None:
            slots[0] = round(self.depth * filler)
        order = np.argsort(slots, kind="stable")
        for before, needle in enumerate(order):
            start = int(slots[needle]) + before * size
            tokens[start : start + size] = [0, keys[needle], *values[needle]]
        tokens[question:] = [1, keys[0], *values[0, :-1]]
        return Row(tokens, np.arange(question + 1, length), values[0])

    def _share(self) -> int:
        return (self.vocabulary_size - 2) // 3


TASKS = {
    "associative_recall": AssociativeRecall,
    "copying": Copying,
    "induction": Induction,
    "needle": Needle,
}


def make_task(config: DataConfig) -> Task:
    """The task that `config.source` names, with the options `config.task`.

    Raises:
      ConfigError: an option is unknown, ill-typed or does not fit `config.sequence_length`.
    """
    task = build(TASKS[config.source], config.task, "config.data.task")
    problem = task.problem(config.sequence_length)
    if problem is None and task.valid_rows < 1:
        problem = f"valid_rows={task.valid_rows}; it must be at least 1"
    if problem is not None:
        raise ConfigError(f"config.data.task ({config.source}): {problem}")
    return task


def score(predictions: Int[np.ndarray, "B T"], batch: Batch) -> dict[str, float]:
    """Exact scores of predicted tokens, the argmax at each place, where `weights` is 1.

    Returns `accuracy` (share of right answers), `exact_match` (share of rows with all answers
    right), and the numbers of `queries` and `rows` they are shares of. NaN where there are none.
    """
    asked = batch["weights"] > 0
    right = asked & (np.asarray(predictions) == batch["labels"])
    rows = asked.any(axis=1)
    exact = rows & (right.sum(axis=1) == asked.sum(axis=1))
    queries, answered = int(asked.sum()), int(rows.sum())
    return {
        "accuracy": right.sum() / queries if queries else float("nan"),
        "exact_match": exact.sum() / answered if answered else float("nan"),
        "queries": queries,
        "rows": answered,
    }
