"""Sweep expressions: what they contain, and what they refuse."""

import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.sweeping import (
    Sweep,
    chain,
    choice,
    log_uniform,
    over,
    product,
    sample,
    uniform,
    zipped,
)

A, B = over("a", [1, 2]), over("b.c", ["x", "y", "z"])


def test_product_has_every_combination_the_last_changing_fastest():
    runs = product(A, B)
    assert [(run["a"], run["b.c"]) for run in runs] == [(i, j) for i in (1, 2) for j in "xyz"]
    assert product() == ({},) and product(A) == A
    assert product(product(A, B), over("d", [0])) == product(A, B, over("d", [0]))


def test_zipped_pairs_and_chain_appends():
    assert zipped(A, over("d", [3, 4])) == ({"a": 1, "d": 3}, {"a": 2, "d": 4})
    assert chain(A, B) == (*A, *B)
    assert product(over("d", [0]), chain(A, B)) == tuple({"d": 0, **run} for run in (*A, *B))


FIELDS = {"rate": log_uniform(1e-4, 1e-1), "drop": uniform(0, 0.5), "name": choice(["u", "v"])}


def test_samples_are_seeded_and_grow():
    few, many = sample(5, FIELDS, seed=1), sample(50, FIELDS, seed=1)
    assert many[:5] == few and sample(5, FIELDS, seed=2) != few
    alone = sample(50, {"drop": FIELDS["drop"]}, seed=1)
    assert [run["drop"] for run in alone] == [run["drop"] for run in many]
    assert all(1e-4 <= run["rate"] <= 1e-1 and 0 <= run["drop"] <= 0.5 for run in many)
    assert {run["name"] for run in many} == {"u", "v"}
    assert 15 <= sum(run["rate"] < 10**-2.5 for run in many) <= 35  # half, in logarithms
    assert all(float(f"{run['rate']:.4g}") == run["rate"] for run in many)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: over("a", []), ["a", "no values"]),
        (lambda: product(A, over("a", [3])), ["a is set twice"]),
        (lambda: zipped(A, B), ["[2, 3]", "equally many"]),
        (lambda: uniform(1, 1), ["uniform(1, 1)", "low < high"]),
        (lambda: log_uniform(0, 1), ["log_uniform(0, 1)", "0 < low"]),
        (lambda: choice([]), ["no values"]),
        (lambda: Sweep("configs/debug.py", A, metric="los"), ["'los'", "loss, bits_per_byte"]),
    ],
)
def test_what_means_nothing_is_refused(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert all(word in str(caught.value) for word in words)
