"""Token shards: round trip, splits, damage by name, and the door that writes them."""

import errno
import os

import numpy as np
import pytest

from efficient_lm.config import DataConfig
from efficient_lm.data import pipeline, shards
from efficient_lm.data.tokenizers import ByteTokenizer, IntegerTokenizer
from efficient_lm.data.write_shards import write_shards
from efficient_lm.errors import DataError


@pytest.mark.parametrize(("vocabulary_size", "width"), [(300, 2), (2**16, 2), (2**16 + 1, 4)])
@pytest.mark.parametrize("end_of_text", [None, 5])
def test_round_trip(vocabulary_size, width, end_of_text, rng, tmp_path):
    documents = [rng.integers(vocabulary_size, size=n) for n in (3, 1, 0, 7)]
    documents[0][0] = vocabulary_size - 1
    count = shards.write_token_shard(
        tmp_path / "a.bin", documents, vocabulary_size=vocabulary_size, end_of_text=end_of_text
    )
    shard = shards.read_token_shard(tmp_path / "a.bin")
    assert shard.tokens.dtype.itemsize == width and len(shard.tokens) == count
    assert (shard.vocabulary_size, shard.end_of_text) == (vocabulary_size, end_of_text)
    found = np.split(shard.tokens, shard.document_starts[1:])
    before = [] if end_of_text is None else [end_of_text]
    assert [d.tolist() for d in found] == [before + d.tolist() for d in documents if len(d)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin"]


def write(path, documents=((1, 2, 3, 4), (5, 6)), **options):
    shards.write_token_shard(
        path, [np.array(d) for d in documents], **{"vocabulary_size": 256, **options}
    )
    return path


def test_damage_is_reported_by_name(tmp_path):
    path = write(tmp_path / "bad.bin")
    good = path.read_bytes()
    cases = [
        (good[:-3], r"bad\.bin has \d+ bytes, its header promises \d+.*truncated"),
        (good + b"x", r"bad\.bin has \d+ bytes"),
        (good[:20], r"bad\.bin is not a token shard"),
        (b"x" * 100, r"bad\.bin is not a token shard"),
        (b"", r"bad\.bin is not a token shard"),
        (good[:17] + b"\x07" + good[18:], r"bad\.bin has a damaged header"),
        (good[:8] + b"\x09" + good[9:], r"bad\.bin is a token shard of version 9; known: 1"),
        (good[:-8] + b"\xff" * 8, r"bad\.bin has damaged document offsets"),
    ]
    for data, message in cases:
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            shards.read_token_shard(path)
    with pytest.raises(DataError, match=r"cannot read .*none\.bin"):
        shards.read_token_shard(tmp_path / "none.bin")


def test_ids_outside_the_vocabulary_are_refused_and_leave_no_shard(tmp_path):
    with pytest.raises(DataError, match="token id 256 is outside the vocabulary of 256"):
        write(tmp_path / "a.bin", [[1, 256]])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_no_shard(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot write .*a\.bin: No space left on device"):
        write(tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())


def test_a_shard_of_another_tokenizer_is_refused(tmp_path):
    write(tmp_path / "a.bin", vocabulary_size=257)
    config = DataConfig(source="tokens", paths=(str(tmp_path),), sequence_length=2)
    with pytest.raises(DataError, match=r"a\.bin was written with a vocabulary of 257.* has 256"):
        pipeline.make_train_iterator(config, ByteTokenizer())
    write(tmp_path / "a.bin", end_of_text=9)
    with pytest.raises(DataError, match=r"a\.bin was written with end-of-text token 9"):
        pipeline.make_train_iterator(config, ByteTokenizer())


@pytest.mark.parametrize("packing", ["concat_then_split", "first_fit"])
def test_shards_give_the_batches_of_the_text(packing, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text(chr(ord("a") + i) * (5 + 9 * i))
    options = {"sequence_length": 8, "batch_size": 4, "packing": packing}
    from_text = DataConfig(source="text", paths=(str(text),), **options)
    for split in ("train", "valid"):
        documents = pipeline.read_documents(from_text, split)
        write_shards(documents, ByteTokenizer(), tmp_path / split, tokens_per_shard=200)
    assert len(list((tmp_path / "train").iterdir())) > 1
    from_shards = DataConfig(
        source="tokens", paths=(f"{tmp_path}/train",), valid_paths=(f"{tmp_path}/valid",), **options
    )
    one = pipeline.make_train_iterator(from_text, ByteTokenizer())
    two = pipeline.make_train_iterator(from_shards, ByteTokenizer())
    for _ in range(30):
        a, b = next(one), next(two)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    valid = [list(pipeline.make_evaluation_batches(c, ByteTokenizer()))
             for c in (from_text, from_shards)]  # fmt: skip
    for a, b in zip(*valid, strict=True):
        np.testing.assert_array_equal(a["labels"], b["labels"])


@pytest.mark.parametrize("end_of_text", [None, 7])
def test_a_single_shard_is_cut_at_a_document(end_of_text, tmp_path):
    class Tokenizer(IntegerTokenizer):
        pass

    tokenizer = Tokenizer(256)
    tokenizer.end_of_text = end_of_text
    documents = [np.full(10, 10 + i) for i in range(20)]
    write(tmp_path / "a.bin", documents, end_of_text=end_of_text)
    config = DataConfig(source="tokens", paths=(str(tmp_path / "a.bin"),), valid_fraction=0.3)
    train = shards.load_split(config, "train", tokenizer)
    valid = shards.load_split(config, "valid", tokenizer)
    assert len(train.document_starts) == 14 and len(valid.document_starts) == 6
    letters = [set(c.read(0, len(c)).tolist()) - {7} for c in (train, valid)]
    assert letters == [set(range(10, 24)), set(range(24, 30))]
    assert valid.document_starts[0] == 0
    if end_of_text is not None:
        assert train.read(len(train) - 1, len(train)).tolist() == [7]


def test_writing_refuses_to_mix_and_to_write_nothing(tmp_path):
    with pytest.raises(DataError, match="there is no text"):
        write_shards([""], ByteTokenizer(), tmp_path / "a", 100)
    write_shards(["abc"], ByteTokenizer(), tmp_path / "a", 100)
    with pytest.raises(DataError, match="holds token shards already"):
        write_shards(["abc"], ByteTokenizer(), tmp_path / "a", 100)
