"""What each part runs in each arm: "smoke" for tests, "cpu..." in minutes, "gpu" for one H200."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import decode
import quality
import speed
from quality import Task
from shapes import MIXERS, Shape

from efficient_lm.evaluation.results import attempt_prepared

TINY = Shape(embed_dim=32, num_layers=2, hidden_dim=64, vocabulary_size=256, head_dim=8, length=32,
             rows=4, value_groups=1, expand=1)  # fmt: skip
# The shapes of a model with about a billion parameters, and a small vocabulary.
BILLION = Shape(embed_dim=2048, num_layers=16, hidden_dim=6144, vocabulary_size=32_768,
                head_dim=128, length=2048, rows=32, dtype="bfloat16", remat="products")  # fmt: skip

QUALITY = {
    ("language", "smoke"): Task(TINY, 4, (1e-2,), (0,), 4, (), "ref"),
    ("language", "cpu"): Task(
        Shape(embed_dim=128, num_layers=4, hidden_dim=256, vocabulary_size=256, head_dim=32,
              length=128, rows=8), 250, (5e-3,), (0,), 128, (), "ref",
    ),
    ("language", "gpu"): Task(
        Shape(embed_dim=512, num_layers=8, hidden_dim=1536, vocabulary_size=256, head_dim=128,
              length=1024, rows=16, dtype="bfloat16"), 1600, (4e-3,), (0,), 512,
    ),
    ("recall", "smoke"): Task(TINY, 4, (5e-3, 1e-2), (0, 1), 8, (2, 4), "ref"),
    ("recall", "cpu"): Task(
        Shape(embed_dim=64, num_layers=4, hidden_dim=64, vocabulary_size=64, head_dim=8,
              attention_heads=4, first_window=4, length=32, rows=64, value_groups=1, expand=1),
        400, (5e-3,), (0,), 512, (2, 4, 8), "ref",
    ),
    # Memories a quarter as large as in "cpu", and so few steps that attention alone has learned it.
    ("recall", "cpu_small_state"): Task(
        Shape(embed_dim=32, num_layers=4, hidden_dim=32, vocabulary_size=64, head_dim=4,
              attention_heads=1, first_window=2, length=32, rows=48, value_groups=1, expand=1),
        125, (5e-3,), (0, 1, 2), 512, (2, 4, 8), "ref",
    ),
    ("recall", "gpu"): Task(
        Shape(embed_dim=64, num_layers=4, hidden_dim=64, vocabulary_size=128, head_dim=8,
              attention_heads=2, first_window=2, length=128, rows=125, value_groups=1, expand=1),
        1500, (2.5e-3, 5e-3), (0, 1, 2), 512, (2, 4, 8, 16, 32), "xla",
    ),
}  # fmt: skip
# (shape, lengths, mixers, timed steps, attention's implementation)
SPEED = {
    "smoke": (TINY, [32], ["attention", "hybrid"], 1, "auto"),
    "gpu": (BILLION, [8192, 65_536, 16_384, 32_768, 2048, 4096], list(MIXERS), 3, "cudnn"),
}
# (shape, contexts, mixers, dispatches)
DECODE = {
    "smoke": (TINY, [8, 64], ["attention", "gated_deltanet"], 1),
    "gpu": (
        # Every layer is compiled apart, so a quarter of the layers.
        Shape(embed_dim=2048, num_layers=4, hidden_dim=6144, vocabulary_size=32_768, head_dim=128,
              length=2048, rows=4, dtype="bfloat16"),
        [1024, 65_536], list(MIXERS), 2,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is written about a part beforehand, and the rows as they come."""

    settings: dict[str, Any]
    rows: Iterable[dict[str, Any]]


def plan(
    part: str, arm: str, mixers: list[str] | None = None, lengths: list[int] | None = None,
    seeds: list[int] | None = None,
) -> Plan:  # fmt: skip
    """The plan of a part; mixers, lengths, seeds: None for those of the arm."""
    workers = 6 if arm == "gpu" else 1
    table = {"speed": SPEED, "decode": DECODE}.get(part)
    if table is None:
        table = {name: task for (of, name), task in QUALITY.items() if of == part}
    if arm not in table:
        raise SystemExit(f"--part={part} has the arms {', '.join(table)}; --arm={arm} is not one")
    if part in ("language", "recall"):
        task = table[arm]
        task = replace(task, seeds=tuple(seeds or task.seeds))
        return Plan(asdict(task), trained(part, task, mixers or MIXERS, workers))
    shape, sizes, names, *rest = table[arm]
    sizes, names = lengths or sizes, mixers or names
    settings = {"shape": asdict(shape), "lengths": sizes, "mixers": names, "rest": rest}
    rows = speed.rows(shape, sizes, names, *rest, workers) if part == "speed" else (
        decode.rows(shape, sizes, names, *rest)
    )  # fmt: skip
    return Plan(settings, rows)


def trained(part: str, task: Task, mixers: Iterable[str], workers: int) -> Iterator[dict]:
    """A row a mixer; `workers` compile at a time."""
    prepare = quality.prepare_language if part == "language" else quality.prepare_recall
    quality.load(task)
    jobs = [({"what": part, "mixer": mixer}, partial(prepare, task, mixer)) for mixer in mixers]
    return attempt_prepared(jobs, workers)
