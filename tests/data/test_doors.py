"""The doors of the data package, as a person calls them."""

import subprocess
import sys

import numpy as np
import pytest

from efficient_lm.config import DataConfig
from efficient_lm.data import pipeline, tokenizers
from efficient_lm.data.train_tokenizer import train_tokenizer
from efficient_lm.errors import DataError


def run(module, *arguments):
    command = [sys.executable, "-m", f"efficient_lm.data.{module}", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def corpus(tmp_path):
    text = "The quick brown fox jumps over the lazy dog. Naïve café, 日本語.\n" * 5
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(text[i:])
    return tmp_path


def test_train_a_tokenizer_then_write_shards_then_read_them(corpus, tmp_path):
    out = tmp_path / "out"
    done = run(
        "train_tokenizer", f"--paths={corpus}/*.txt", "--vocabulary_size=300", f"--out={out}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: 300 tokens")
    shards = tmp_path / "shards"
    done = run("write_shards", f"--paths={corpus}/*.txt", f"--tokenizer={out}", f"--out={shards}",
               "--tokens_per_shard=500")  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokenizer = tokenizers.load_tokenizer(shards / "tokenizer")
    assert tokenizer.end_of_text == 0 and tokenizer.vocabulary_size == 300
    config = DataConfig(
        source="tokens", paths=(f"{shards}/train",), valid_paths=(f"{shards}/valid",),
        sequence_length=32, batch_size=2,
    )  # fmt: skip
    text_config = DataConfig(source="text", paths=(f"{corpus}/*.txt",))
    documents = list(pipeline.read_documents(text_config, "valid"))
    batches = list(pipeline.make_evaluation_batches(config, tokenizer))
    labels = np.concatenate([b["labels"][b["weights"] > 0] for b in batches])
    # All bytes of the split are scored: end-of-text is the context of each first token.
    assert tokenizer.byte_lengths[labels].sum() == sum(len(d.encode()) for d in documents)
    assert (labels == 0).sum() == len(documents)
    assert next(pipeline.make_train_iterator(config, tokenizer))["tokens"].max() < 300


def test_errors_are_one_line(tmp_path):
    done = run("train_tokenizer", f"--paths={tmp_path}/none.txt", f"--out={tmp_path}/out")
    assert done.returncode == DataError.exit_code and done.stdout == ""
    assert done.stderr == f"error: {tmp_path}/none.txt does not exist (config.data.paths)\n"
    done = run("write_shards", "--tokens_per_shard=0", f"--out={tmp_path}/out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_vocabularies_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(DataError, match="vocabulary_size=256; it must be at least 257"):
        train_tokenizer(["text"], 256, tmp_path)
    with pytest.raises(DataError, match=r"yields \d+ tokens, not vocabulary_size=1000"):
        train_tokenizer(["text"], 1000, tmp_path)
    assert not list(tmp_path.iterdir())
