"""Synthetic tasks: a rule solves them, chance does not, rows depend on the seed alone."""

import numpy as np
import pytest

from efficient_lm.config import DataConfig
from efficient_lm.data import pipeline, synthetic, tokenizers
from efficient_lm.errors import ConfigError

CASES = [
    ("associative_recall", {"vocabulary_size": 64, "pairs": 6}),
    ("associative_recall", {"vocabulary_size": 64, "pairs": 16, "filler": "zero"}),
    ("copying", {}),
    ("copying", {"min_symbols": 2, "max_symbols": 20, "vocabulary_size": 5}),
    ("induction", {}),
    ("needle", {}),
    ("needle", {"needles": 5, "value_length": 3, "vocabulary_size": 64}),
    ("needle", {"needles": 2, "depth": 0.5}),
]


def config_of(source, task, **options):
    defaults = {"sequence_length": 64, "batch_size": 8}
    return DataConfig(source=source, task=task, **{**defaults, **options})


def solve(config, tokens):
    """The right answer at each place that has one, by rule, from the tokens up to it."""
    task = synthetic.make_task(config)
    answers = np.full(tokens.shape, -1)
    for b, row in enumerate(tokens.tolist()):
        for t in range(len(row)):
            past = row[: t + 1]
            if config.source == "associative_recall":
                table = dict(zip(past[0 : 2 * task.pairs : 2], past[1 : 2 * task.pairs : 2],
                                 strict=False))  # fmt: skip
                answers[b, t] = table.get(row[t], -1)
            elif config.source == "copying" and 0 in past:
                count = past.index(0)
                answers[b, t] = past[min(t - count, count - 1)]
            elif config.source == "induction":
                marker = task.vocabulary_size - 1
                answers[b, t] = past[past.index(marker) + 1] if past.count(marker) > 1 else -1
            elif config.source == "needle" and 1 in past[:-1]:
                question = past.index(1)
                key, place = past[question + 1], t - question - 1
                start = next(i for i in range(question) if past[i] == 0 and past[i + 1] == key)
                answers[b, t] = past[start + 2 + place]
    return answers


@pytest.mark.parametrize(("source", "task"), CASES)
def test_a_rule_solves_the_task_and_chance_does_not(source, task, rng):
    config = config_of(source, task)
    made = synthetic.make_task(config)
    batch = made.batch(config, "train", np.arange(40))
    assert batch["tokens"].min() >= 0 and batch["tokens"].max() < made.vocabulary_size
    assert batch["labels"].max() < made.vocabulary_size
    assert (batch["weights"].sum(axis=1) > 0).all()
    solved = synthetic.score(solve(config, batch["tokens"]), batch)
    assert solved["accuracy"] == solved["exact_match"] == 1.0
    assert solved["rows"] == 40 and solved["queries"] == batch["weights"].sum()
    guesses = rng.integers(made.vocabulary_size, size=batch["tokens"].shape)
    assert synthetic.score(guesses, batch)["accuracy"] < 0.35


def test_score_counts_queries_and_rows():
    batch = {
        "weights": np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]], np.float32),
        "labels": np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.int32),
    }
    predictions = np.array([[1, 2, 0], [0, 5, 0], [0, 0, 0]])
    assert synthetic.score(predictions, batch) == {
        "accuracy": 0.75, "exact_match": 0.5, "queries": 4, "rows": 2
    }  # fmt: skip
    batch["weights"][:] = 0
    assert np.isnan(synthetic.score(predictions, batch)["accuracy"])


def test_rows_depend_on_seed_split_and_number_alone():
    config = config_of("induction", {})
    task = synthetic.make_task(config)
    rows = task.batch(config, "train", np.arange(10))["tokens"]
    np.testing.assert_array_equal(
        task.batch(config, "train", np.array([7, 3]))["tokens"], rows[[7, 3]]
    )
    other_seed = config_of("induction", {}, seed=1)
    for options, split in ((config, "valid"), (other_seed, "train")):
        other = task.batch(options, split, np.arange(10))
        assert (other["tokens"] != rows).any(axis=1).all()


def test_associative_recall_asks_every_key_once_in_its_places():
    config = config_of("associative_recall", {"vocabulary_size": 64, "pairs": 6})
    batch = synthetic.make_task(config).batch(config, "train", np.arange(20))
    for row in range(20):
        places = np.flatnonzero(batch["weights"][row])
        assert sorted(batch["tokens"][row, places]) == sorted(batch["tokens"][row, 0:12:2])
        assert (places >= 12).all() and (places % 2 == 0).all()
        assert (batch["tokens"][row, 0:12:2] < 32).all() and (
            batch["labels"][row, places] >= 32
        ).all()


def test_depth_places_the_needle():
    for depth, place in ((0.0, 0), (1.0, 64 - 2 - 3), (0.5, 30)):
        config = config_of("needle", {"depth": depth})
        tokens = synthetic.make_task(config).batch(config, "train", np.arange(5))["tokens"]
        assert {row.tolist().index(0) for row in tokens} == {place}


def test_the_pipeline_trains_and_evaluates_on_tasks():
    config = config_of("copying", {"valid_rows": 13, "vocabulary_size": 10})
    tokenizer = tokenizers.make_tokenizer(config)
    assert tokenizer.vocabulary_size == 10
    iterator = pipeline.make_train_iterator(config, tokenizer)
    first, second = next(iterator), next(iterator)
    assert (first["tokens"] != second["tokens"]).any(axis=1).all()
    half = pipeline.make_train_iterator(config, tokenizer, process_index=1, process_count=2)
    np.testing.assert_array_equal(next(half)["tokens"], first["tokens"][4:])
    again = pipeline.make_train_iterator(config, tokenizer)
    again.set_state(half.get_state())
    np.testing.assert_array_equal(next(again)["tokens"], second["tokens"])

    batches = list(pipeline.make_evaluation_batches(config, tokenizer))
    assert [b["tokens"].shape for b in batches] == [(8, 64)] * 2
    assert synthetic.score(solve(config, np.concatenate([b["tokens"] for b in batches])),
        {n: np.concatenate([b[n] for b in batches]) for n in batches[0]}) == {
        "accuracy": 1.0, "exact_match": 1.0, "queries": 13 * 32, "rows": 13}  # fmt: skip
    assert len(pipeline.make_evaluation_batches(config, tokenizer, limit=1)) == 1


@pytest.mark.parametrize(
    ("source", "task", "message"),
    [
        ("copying", {"symbol": 3}, "unknown field config.data.task.symbol; did you mean"),
        ("copying", {"max_symbols": "3"}, "config.data.task.max_symbols='3'"),
        ("copying", {"max_symbols": 33}, "max_symbols=33; allowed: .* half of sequence_length=64"),
        ("associative_recall", {"pairs": 17}, "pairs=17; allowed: 1 to a quarter"),
        ("associative_recall", {"vocabulary_size": 8}, "vocabulary_size=8"),
        ("induction", {"vocabulary_size": 2}, "vocabulary_size=2; it must be at least 3"),
        ("needle", {"needles": 30}, "take 92 tokens of sequence_length=64"),
        ("needle", {"depth": 2.0}, "depth=2.0; allowed: 0 to 1"),
        ("needle", {"valid_rows": 0}, "valid_rows=0"),
    ],
)
def test_bad_options_are_named(source, task, message):
    with pytest.raises(ConfigError, match=message):
        synthetic.make_task(config_of(source, task))
