"""Which fields take which values: expressions that are plain tuples of {dotted field: value}."""

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from efficient_lm.errors import ConfigError

Expression = tuple[Mapping[str, Any], ...]
Distribution = Callable[[np.random.Generator], Any]

METRICS = ("loss", "bits_per_byte")  # of the validation split; lower is better
_DIGITS = 4  # of sampled numbers, so that they can be read and typed


@dataclass(frozen=True)
class Sweep:
    """What `get_sweep()` returns: a config, the settings of its runs, and what to compare."""

    config: str  # the file, and its argument if any: configs/llama3.py:1b
    runs: Expression
    metric: str = "loss"  # of METRICS

    def __post_init__(self):
        if self.metric not in METRICS:
            raise ConfigError(f"metric={self.metric!r} of a sweep; allowed: {', '.join(METRICS)}")


def over(field: str, values: Iterable[Any]) -> Expression:
    """One run for each value: `over("optimizer.learning_rate", [1e-3, 3e-3])`."""
    settings = tuple({field: value} for value in values)
    if not settings:
        raise ConfigError(f'over("{field}", ...) has no values; give at least one')
    return settings


def product(*expressions: Expression) -> Expression:
    """Every combination, the last expression changing fastest; ConfigError if fields repeat."""
    return tuple(_merge(parts) for parts in itertools.product(*expressions))


def zipped(*expressions: Expression) -> Expression:
    """The first of each, the second of each, ...; ConfigError if they are not equally long."""
    lengths = [len(expression) for expression in expressions]
    if len(set(lengths)) > 1:
        raise ConfigError(f"zipped(...) of {lengths} settings; they must be equally many")
    return tuple(_merge(parts) for parts in zip(*expressions, strict=True))


def chain(*expressions: Expression) -> Expression:
    """The runs of the first expression, then those of the second, ..."""
    return tuple(itertools.chain(*expressions))


def sample(count: int, fields: Mapping[str, Distribution], *, seed: int = 0) -> Expression:
    """`count` draws: `sample(20, {"optimizer.learning_rate": log_uniform(1e-4, 1e-2)})`.

    More draws of the same seed begin with the same ones, and a field draws the same values
    whatever the others are, so that a sweep can grow. Numbers are rounded to four digits.
    """
    streams = {field: np.random.default_rng([seed, zlib.crc32(field.encode())]) for field in fields}
    return tuple(
        {field: draw(streams[field]) for field, draw in fields.items()} for _ in range(count)
    )


def uniform(low: float | int, high: float | int) -> Distribution:
    """Numbers between `low` and `high`."""
    _check_bounds("uniform", low, high, low < high)
    return lambda rng: _round(rng.uniform(low, high))


def log_uniform(low: float | int, high: float | int) -> Distribution:
    """Numbers between `low` and `high`, each octave as often as the others."""
    _check_bounds("log_uniform", low, high, 0 < low < high)
    return lambda rng: _round(math.exp(rng.uniform(math.log(low), math.log(high))))


def choice(values: Iterable[Any]) -> Distribution:
    """One of the values, each as often as the others."""
    options = tuple(values)
    if not options:
        raise ConfigError("choice(...) has no values; give at least one")
    return lambda rng: options[rng.integers(len(options))]


def _merge(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of one run."""
    merged = {}
    for part in parts:
        for field, value in part.items():
            if field in merged:
                raise ConfigError(f"{field} is set twice in one run; chain(...) keeps runs apart")
            merged[field] = value
    return merged


def _check_bounds(name: str, low, high, right: bool) -> None:
    if not right:
        rule = "0 < low < high" if name == "log_uniform" else "low < high"
        raise ConfigError(f"{name}({low}, {high}); it must be {rule}")


def _round(number: float | int) -> float:
    return float(f"{number:.{_DIGITS}g}")
