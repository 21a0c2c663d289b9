"""Batches: every token once, exact resume, process sharding, epochs, documents kept apart."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from efficient_lm.config import DataConfig
from efficient_lm.data import pipeline, sources, tokenizers
from efficient_lm.errors import DataError

BYTES = tokenizers.ByteTokenizer()
NAMES = {"tokens", "labels", "weights", "segment_ids", "positions"}


@pytest.fixture
def folder(tmp_path):
    """Thirty files of different lengths, each of one repeated letter between '<' and '>'."""
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text("<" + chr(ord("A") + i) * (3 + 7 * i) + ">")
    return tmp_path


def text_config(folder, **options):
    defaults = {"source": "text", "sequence_length": 16, "batch_size": 4, "valid_fraction": 0.3}
    return DataConfig(paths=(str(folder),), **{**defaults, **options})


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def check_documents_apart(batch):
    """Positions restart with each segment, and scored labels belong to the token's document."""
    for row in range(len(batch["tokens"])):
        segments, positions = batch["segment_ids"][row], batch["positions"][row]
        for segment in set(segments.tolist()) - {0}:
            here = segments == segment
            np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
            letters = set(batch["tokens"][row][here].tolist()) - set(b"<>")
            scored = here & (batch["weights"][row] > 0)
            letters |= set(batch["labels"][row][scored].tolist()) - set(b"<>")
            assert len(letters) <= 1
            # '>' ends a document: nothing after it is scored.
            assert not (batch["weights"][row][here & (batch["tokens"][row] == ord(">"))]).any()


@pytest.mark.parametrize("mask", [True, False])
def test_windows_fulfil_the_contract(folder, mask):
    config = text_config(folder, mask_across_documents=mask)
    for batch in take(pipeline.make_train_iterator(config, BYTES), 20):
        assert batch.keys() == NAMES
        for name, value in batch.items():
            assert value.shape == (4, 16)
            assert value.dtype == (np.float32 if name == "weights" else np.int32)
        if mask:
            check_documents_apart(batch)
            inner = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
            labels_are_next = batch["labels"][:, :-1] == batch["tokens"][:, 1:]
            assert labels_are_next[inner].all()
        else:
            assert (batch["segment_ids"] == 1).all() and (batch["weights"] == 1).all()
            assert (batch["labels"][:, :-1] == batch["tokens"][:, 1:]).all()


PACKINGS = pytest.mark.parametrize("packing", ["concat_then_split", "first_fit"])


@PACKINGS
def test_resume_from_any_point_equals_never_stopped(folder, packing):
    config = text_config(folder, packing=packing)
    whole = take(pipeline.make_train_iterator(config, BYTES), 60)
    for stop in (0, 1, 7, 41):
        first = pipeline.make_train_iterator(config, BYTES)
        take(first, stop)
        state = json.loads(json.dumps(first.get_state()))
        second = pipeline.make_train_iterator(config, BYTES)
        take(second, 3)  # a state replaces whatever was there
        second.set_state(state)
        assert_equal(take(second, 60 - stop), whole[stop:])


@PACKINGS
def test_processes_together_see_the_same_data(folder, packing):
    config = text_config(folder, packing=packing)
    whole = take(pipeline.make_train_iterator(config, BYTES), 12)
    for count in (2, 4):
        parts = [
            take(
                pipeline.make_train_iterator(config, BYTES, process_index=i, process_count=count),
                12,
            )
            for i in range(count)
        ]
        joined = [
            {name: np.concatenate([b[name] for b in batches]) for name in NAMES}
            for batches in zip(*parts, strict=True)
        ]
        assert_equal(joined, whole)


@PACKINGS
def test_a_state_fits_another_process_count(folder, packing):
    config = text_config(folder, packing=packing)
    one = pipeline.make_train_iterator(config, BYTES)
    take(one, 5)
    half = pipeline.make_train_iterator(config, BYTES, process_index=1, process_count=2)
    half.set_state(one.get_state())
    np.testing.assert_array_equal(next(half)["tokens"], next(one)["tokens"][2:])


def test_a_position_in_other_data_is_refused(folder):
    state = pipeline.make_train_iterator(text_config(folder), BYTES).get_state()
    other = pipeline.make_train_iterator(text_config(folder, packing="first_fit"), BYTES)
    with pytest.raises(DataError, match="one in 'text, concat_then_split', the data is now"):
        other.set_state(state)


def test_importing_the_pipeline_imports_nothing_heavy():
    heavy = "{'grain', 'datasets', 'pyarrow', 'tokenizers', 'orbax'}"
    program = f"import sys, efficient_lm.data.pipeline; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@PACKINGS
def test_the_seed_decides_the_order(folder, packing):
    def batches(seed):
        config = text_config(folder, packing=packing, seed=seed)
        return take(pipeline.make_train_iterator(config, BYTES), 3)

    same = [batches(0), batches(0)]
    assert_equal(*same)
    other = batches(-1)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(same[0], other, strict=True))


def test_epochs_cover_the_text_at_new_offsets_and_in_new_order(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(1000))  # every character once
    (tmp_path / "a.txt").write_text(text)
    config = text_config(tmp_path, tokenizer="characters", batch_size=1, valid_fraction=0.1)
    tokenizer = tokenizers.make_tokenizer(config)
    windows = (900 - 1) // 16 - 1
    iterator = pipeline.make_train_iterator(config, tokenizer)
    orders, offsets = set(), set()
    for _ in range(8):
        starts = [int(batch["tokens"][0, 0]) for batch in take(iterator, windows)]
        assert len(set(starts)) == windows  # nothing twice in an epoch
        assert {s % 16 for s in starts} == {min(starts) % 16}
        orders.add(tuple((s - min(starts)) // 16 for s in starts))
        offsets.add(min(starts) % 16)
    assert len(orders) == 8 and len(offsets) > 3

    unshuffled = pipeline.make_train_iterator(
        text_config(tmp_path, shuffle=False, batch_size=1), tokenizer
    )
    starts = [int(batch["tokens"][0, 0]) for batch in take(unshuffled, 60)]
    assert starts == [16 * (i % ((700 - 1) // 16)) for i in range(60)]


@pytest.mark.parametrize("stride", [16, 5, 1])
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_scores_every_token_once(tmp_path, stride, processes):
    text = "".join(map(str, range(200)))
    (tmp_path / "a.txt").write_text(text)
    config = text_config(tmp_path, mask_across_documents=False)
    valid = text[int(len(text) * 0.7) :]
    scored = []
    parts = [
        list(
            pipeline.make_evaluation_batches(
                config, BYTES, stride=stride, process_index=i, process_count=processes
            )
        )
        for i in range(processes)
    ]
    for batches in zip(*parts, strict=True):
        for batch in batches:
            assert batch["tokens"].shape == (4 // processes, 16)
            scored += batch["labels"][batch["weights"] == 1].tolist()
            assert not batch["weights"][batch["segment_ids"] == 0].any()
    assert bytes(scored).decode() == valid[1:]


def test_sliding_windows_have_context(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 500)
    config = text_config(tmp_path)
    batches = list(pipeline.make_evaluation_batches(config, BYTES, stride=4))
    weights = np.concatenate([b["weights"] for b in batches])
    assert (weights[0] == 1).all()
    assert not weights[1:, :12].any()


def test_evaluation_of_documents_leaves_out_their_first_token(folder):
    config = text_config(folder)
    batches = pipeline.make_evaluation_batches(config, BYTES)
    scored = np.concatenate([b["labels"][b["weights"] == 1] for b in batches])
    documents = list(sources.read_documents(config, "valid"))
    assert bytes(scored.tolist()).decode() == "".join(d[1:] for d in documents)
    for batch in batches:  # iterates a second time
        check_documents_apart(batch)


def test_evaluation_limit_spreads_over_the_split(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(0x4E00 + i) for i in range(5000)))
    config = text_config(tmp_path, tokenizer="characters", valid_fraction=0.5)
    tokenizer = tokenizers.make_tokenizer(config)
    batches = list(pipeline.make_evaluation_batches(config, tokenizer, limit=3))
    assert len(batches) == 3
    labels = np.concatenate([b["labels"][b["weights"] == 1] for b in batches])
    assert len(set(labels.tolist())) == len(labels) == 3 * 4 * 16
    assert labels.min() < 2600 and labels.max() > 4700


def test_impossible_requests_are_refused(tmp_path, folder):
    with pytest.raises(DataError, match=r"batch_size=4 is not divisible by the 3 processes"):
        pipeline.make_train_iterator(text_config(folder), BYTES, process_count=3)
    with pytest.raises(DataError, match=r"stride=17; allowed: 1 to .*16"):
        pipeline.make_evaluation_batches(text_config(folder), BYTES, stride=17)
    with pytest.raises(DataError, match=r"sequence_length=100000 needs at least 100001"):
        pipeline.make_train_iterator(text_config(folder, sequence_length=100000), BYTES)


def test_first_fit_epochs_have_every_document_once_in_new_order(folder):
    config = text_config(folder, packing="first_fit", batch_size=1, sequence_length=256)
    documents = list(sources.read_documents(config, "train"))
    iterator = pipeline.make_train_iterator(config, BYTES)
    counts, orders = np.zeros(256, np.int64), []
    expected = np.bincount(np.concatenate([BYTES.encode(d[1:]) for d in documents]), minlength=256)
    for epoch in range(1, 4):
        order = []
        while counts.sum() < epoch * expected.sum():
            batch = next(iterator)
            check_documents_apart(batch)
            counts += np.bincount(batch["labels"][batch["weights"] > 0], minlength=256)
            order += batch["tokens"][batch["positions"] == 1].tolist()
        np.testing.assert_array_equal(counts, epoch * expected)
        orders.append(order)
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2]


def test_first_fit_refuses_documents_of_one_token(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text("x")
    with pytest.raises(DataError, match="no document of two tokens"):
        pipeline.make_train_iterator(text_config(tmp_path, packing="first_fit"), BYTES)
