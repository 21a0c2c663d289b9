"""Streams: splits by content, exact resume over epochs, processes with documents of their own."""

import itertools
import json

import numpy as np
import pytest

from efficient_lm.config import DataConfig
from efficient_lm.data import pipeline, streaming
from efficient_lm.data.tokenizers import ByteTokenizer
from efficient_lm.errors import DataError

BYTES = ByteTokenizer()
TEXTS = [f"<{i}" + "x" * (i % 7) + ">" for i in range(50)]


class FakeStream:
    """What is used of datasets.IterableDataset: rows, epochs, and a state that goes on exactly."""

    def __init__(self, rows):
        self.rows, self.next, self.epoch, self.resume = rows, 0, 0, None

    def __iter__(self):
        same_epoch = self.resume is not None and self.resume["epoch"] == self.epoch
        self.next = self.resume["next"] if same_epoch else 0
        while self.next < len(self.rows):
            self.next += 1
            yield {"text": self.rows[self.next - 1]}

    def set_epoch(self, epoch):
        self.epoch = epoch

    def state_dict(self):
        return {"next": self.next, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.resume = state


@pytest.fixture(autouse=True)
def fake_datasets(monkeypatch):
    def open_stream(paths, default_split, process_index=0, process_count=1):
        rows = [t + "!" for t in TEXTS] if default_split == "validation" else TEXTS
        return FakeStream(rows[process_index::process_count])

    monkeypatch.setattr(streaming, "open_stream", open_stream)
    monkeypatch.setattr(streaming, "DOCUMENTS_PER_GROUP", 8)


def config_of(**options):
    defaults = {"sequence_length": 16, "batch_size": 4, "valid_fraction": 0.2}
    return DataConfig(source="hugging_face", paths=("name", "subset"), **{**defaults, **options})


@pytest.mark.parametrize("packing", ["concat_then_split", "first_fit"])
def test_resume_from_any_point_equals_never_stopped(packing):
    config = config_of(packing=packing)
    whole = list(itertools.islice(pipeline.make_train_iterator(config, BYTES), 40))
    for stop in (0, 1, 6, 23):
        first = pipeline.make_train_iterator(config, BYTES)
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        second = pipeline.make_train_iterator(config, BYTES)
        second.set_state(state)
        for batch in whole[stop:]:
            np.testing.assert_array_equal(next(second)["labels"], batch["labels"])


def test_train_and_valid_share_no_text_and_cover_the_stream():
    config = config_of(packing="first_fit", batch_size=1, sequence_length=32)
    valid = list(pipeline.read_documents(config, "valid"))
    train = list(pipeline.read_documents(config, "train"))
    assert 3 <= len(valid) <= 20 and sorted(valid + train) == sorted(TEXTS)
    iterator = pipeline.make_train_iterator(config, BYTES)
    seen = 0
    while seen < 2 * sum(len(t) - 1 for t in train):  # two epochs
        batch = next(iterator)
        seen += int(batch["weights"].sum())
        assert not any(t[:-1].encode() in batch["tokens"].astype(np.uint8).tobytes() for t in valid)
    assert seen == 2 * sum(len(t) - 1 for t in train)
    scored = sum(b["weights"].sum() for b in pipeline.make_evaluation_batches(config, BYTES))
    assert scored == sum(len(t) - 1 for t in valid)


def test_epochs_come_in_new_order():
    config = config_of(batch_size=1, valid_paths=("other",))
    iterator = pipeline.make_train_iterator(config, BYTES)
    epochs = []
    for _ in range(2):
        rows, seen = [], 0
        while seen < sum(len(t) - 1 for t in TEXTS):
            batch = next(iterator)
            seen += int(batch["weights"].sum())
            rows.append(batch["tokens"].tobytes())
        epochs.append(rows)
    assert epochs[0] != epochs[1]


def test_valid_paths_are_the_validation_split():
    config = config_of(valid_paths=("other",))
    assert list(pipeline.read_documents(config, "valid")) == [t + "!" for t in TEXTS]
    assert list(pipeline.read_documents(config, "train")) == TEXTS


def test_a_state_of_another_process_count_is_refused():
    state = pipeline.make_train_iterator(config_of(), BYTES).get_state()
    half = pipeline.make_train_iterator(config_of(), BYTES, process_index=1, process_count=2)
    with pytest.raises(DataError, match="of 1 processes, now there are 2"):
        half.set_state(state)


def test_a_stream_without_training_text_ends_with_an_error(monkeypatch):
    monkeypatch.setattr(streaming, "open_stream", lambda *_: FakeStream(["", ""]))
    with pytest.raises(DataError, match="'name' has no text to train on"):
        next(pipeline.make_train_iterator(config_of(), BYTES))


def test_a_missing_field_is_named():
    with pytest.raises(DataError, match=r"no text field 'body'.*its fields: text"):
        next(pipeline.make_train_iterator(config_of(text_field="body"), BYTES))
