"""What the mixers learn: bits per byte of Python source, and recall by number of pairs."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import shapes
import training

from efficient_lm.config import Config
from efficient_lm.data.pipeline import make_evaluation_batches, make_train_iterator
from efficient_lm.data.synthetic import make_task
from efficient_lm.data.tokenizers import make_tokenizer
from efficient_lm.inference.speed import state_bytes

STEPS_AT_ONCE = 25  # at most, in one call of the device
SCORES = 16  # about so many, of recall on the way


@dataclass(frozen=True)
class Task:
    """A training that is done with every mixer, rate and seed; the best rate counts.

    pairs: numbers of pairs for recall, in equal shares in every batch; empty: language modelling.
    """

    shape: shapes.Shape
    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    evaluation_rows: int
    pairs: tuple[int, ...] = ()
    implementation: str = "auto"  # of the mixers' ops; under vmap, of recall, "xla" or "ref"


def make_config(task: Task, mixer: str) -> Config:
    """The config of a training; its learning rate is 1, for `training.make_programs`."""
    shape = task.shape
    fields = shapes.model_fields(shape, mixer)
    data = {"sequence_length": shape.length, "batch_size": shape.rows, "valid_fraction": 0.05}
    for options in fields["mixers"].values():
        options["implementation"] = task.implementation
    if task.pairs:
        data |= {"source": "associative_recall", "mask_across_documents": False}
    schedule = {"name": "wsd", "warmup_steps": max(1, task.steps // 20), "decay_fraction": 0.5,
                "final_fraction": 0.0}  # fmt: skip
    return Config.from_dict({
        "model": fields,
        "data": data,
        "optimizer": {"name": "muon", "learning_rate": 1.0, "schedule": schedule},
        "training": {"steps": task.steps, "log_every": 1},
        "parallel": {"data": 1},
    })  # fmt: skip


def prepare_language(task: Task, mixer: str) -> Callable[[], dict]:
    """Compile a training; the function that does it for each rate and seed, one after the other.

    Its row has the bits per byte of held-out files.
    """
    config = make_config(task, mixer)
    programs = training.make_programs(config)
    stacks, held_out = text_batches(task), text_evaluation(task)
    began = time.perf_counter()
    run = programs.compile(np.float32(0), stacks[0], held_out[0])
    compile_seconds = time.perf_counter() - began

    def row() -> dict:
        began = time.perf_counter()
        bits: dict[str, list[float]] = {}
        for rate, seed in itertools.product(task.rates, task.seeds):
            state = run.begin(np.int32(seed))
            for stack in stacks:
                state, _ = run.advance(state, np.float32(rate), stack)
            sums = [run.evaluate(state, batch) for batch in held_out]
            nats, size = (sum(float(s[n]) for s in sums) for n in ("loss_sum", "bytes_sum"))
            bits.setdefault(str(rate), []).append(round(nats / size / math.log(2), 4))
        best = min(bits, key=lambda rate: np.mean(bits[rate]))
        return described("language", task, mixer, programs.parameters) | {
            "rate": float(best),
            "bits_per_byte": round(float(np.mean(bits[best])), 4),
            "bits_per_byte_by_rate": bits,
            "bytes_scored": int(size),
            "compile_seconds": round(compile_seconds, 1),
            "seconds": round(time.perf_counter() - began, 1),
        }

    return row


def prepare_recall(task: Task, mixer: str) -> Callable[[], dict]:
    """Compile the training of all rates and seeds together; the function that does it.

    Its row has the accuracy for each number of pairs in the end, and their mean on the way there.
    """
    config = make_config(task, mixer)
    programs = training.make_programs(config)
    stacks = recall_batches(task)
    held_out = {p: recall_rows(task, p, "valid", 0, task.evaluation_rows) for p in task.pairs}
    members = list(itertools.product(task.rates, task.seeds))
    rates = np.array([rate for rate, _ in members], np.float32)
    seeds = np.array([seed for _, seed in members], np.int32)
    began = time.perf_counter()
    run = programs.compile(rates, stacks[0], held_out[task.pairs[0]], len(members))
    compile_seconds = time.perf_counter() - began

    def by_rate(values):  # [members] -> [rates, seeds]
        return np.asarray(values, np.float64).reshape(len(task.rates), -1).round(4)

    def score(state):  # {pairs: accuracy [rates, seeds]}
        sums = {pairs: run.evaluate(state, batch) for pairs, batch in held_out.items()}
        return {p: by_rate(s["correct_sum"] / s["weight_sum"]) for p, s in sums.items()}

    def row() -> dict:
        began = time.perf_counter()
        state, curve, accuracies = run.begin(seeds), [], {}
        for number, stack in enumerate(stacks, 1):
            state, losses = run.advance(state, rates, stack)
            curve.append(losses[:, -1])
            if number % max(1, len(stacks) // SCORES) == 0 or number == len(stacks):
                accuracies[number * steps_at_once(task)] = score(state)
        accuracy = accuracies[task.steps]
        means = np.mean(list(accuracy.values()), axis=(0, 2)).round(4)
        best = int(np.argmax(means))

        def mean(accuracy):  # over numbers of pairs, [seeds]
            return np.mean([a[best] for a in accuracy.values()], axis=0).round(4).tolist()

        return described("recall", task, mixer, programs.parameters) | {
            "rate": task.rates[best],
            "mean_accuracy_by_rate": dict(zip(map(str, task.rates), means.tolist(), strict=True)),
            "accuracy": {str(p): round(a[best].mean(), 4) for p, a in accuracy.items()},
            "accuracy_by_seed": {str(p): a[best].tolist() for p, a in accuracy.items()},
            "mean_accuracy_by_steps": {str(n): mean(a) for n, a in accuracies.items()},
            "loss_curve": [round(by_rate(losses)[best].mean(), 4) for losses in curve],
            "compile_seconds": round(compile_seconds, 1),
            "seconds": round(time.perf_counter() - began, 1),
        }

    return row


def described(what: str, task: Task, mixer: str, parameters: int) -> dict:
    """The beginning of a row."""
    config, length = make_config(task, mixer), task.shape.length
    return {
        "what": what,
        "mixer": mixer,
        "parameters": parameters,
        "state_bytes": state_bytes(config.model, length),
        "memory_bytes": state_bytes(config.model, length, "memory"),
    }


def _stack(batches: list[dict]) -> dict:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def steps_at_once(task: Task) -> int:
    """The largest number that divides the steps, up to STEPS_AT_ONCE."""
    return next(n for n in range(STEPS_AT_ONCE, 0, -1) if task.steps % n == 0)


@cache
def text_batches(task: Task) -> list[dict]:
    """All training batches, `steps_at_once` to a stack; the same for every mixer."""
    data = make_config(task, "attention").data
    iterator = make_train_iterator(data, make_tokenizer(data))
    batches = list(itertools.islice(iterator, task.steps))
    at_once = steps_at_once(task)
    return [_stack(batches[i : i + at_once]) for i in range(0, task.steps, at_once)]


@cache
def text_evaluation(task: Task) -> list[dict]:
    """Windows spread over the held-out files."""
    data = make_config(task, "attention").data
    limit = max(1, task.evaluation_rows // data.batch_size)
    return list(make_evaluation_batches(data, make_tokenizer(data), limit=limit))


def recall_rows(task: Task, pairs: int, split: str, first: int, count: int) -> dict:
    """Rows `first`, ... of the task with this number of pairs."""
    data = replace(
        make_config(task, "attention").data,
        task={"pairs": pairs, "vocabulary_size": task.shape.vocabulary_size, "filler": "zero"},
    )
    return make_task(data).batch(data, split, np.arange(first, first + count))


@cache
def recall_batches(task: Task) -> list[dict]:
    """All training batches, `steps_at_once` to a stack; each has equal shares of `task.pairs`."""
    share = task.shape.rows // len(task.pairs)
    count = share * task.steps
    parts = [recall_rows(task, pairs, "train", 0, count) for pairs in task.pairs]
    length = task.shape.length
    whole = {
        name: np.concatenate([p[name].reshape(task.steps, share, length) for p in parts], axis=1)
        for name in parts[0]
    }
    stacks = task.steps // steps_at_once(task)
    columns = {name: np.split(array, stacks) for name, array in whole.items()}
    return [dict(zip(columns, stack, strict=True)) for stack in zip(*columns.values(), strict=True)]


def load(task: Task) -> None:
    """Make the batches, once for all mixers."""
    if task.pairs:
        recall_batches(task)
    else:
        text_batches(task), text_evaluation(task)
