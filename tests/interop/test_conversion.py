"""Work directories from Hugging Face folders and back, through the functions and the door."""

import errno
import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from interop_cases import MODELS, random_arrays

import efficient_lm
from efficient_lm.config import Config, ModelConfig
from efficient_lm.data.tokenizers import ByteTokenizer, CharacterTokenizer, load_tokenizer
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.inference.load import read_config
from efficient_lm.interop import conversion, hugging_face, shards
from efficient_lm.training.checkpoint import Checkpointer


def files(directory: Path) -> dict[str, bytes]:
    """Content of every file."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("name", "architecture", "parameters"),
    [
        ("qwen3", "Qwen3ForCausalLM", "105,920 parameters (bfloat16)"),
        ("qwen3_5", "Qwen3_5ForCausalLM", "129,496 parameters (bfloat16, float32)"),
    ],
)
def test_there_and_back_with_tokenizer_is_exact(name, architecture, parameters, tmp_path):
    workdir, target = tmp_path / "run", tmp_path / "out"
    lines = conversion.to_workdir(MODELS / name, workdir)
    assert lines == [f"wrote {workdir}: {parameters}"]
    config = Config.from_dict(json.loads((workdir / "config.json").read_text()))
    assert config.data.tokenizer == str(workdir / "tokenizer")
    tokenizer = load_tokenizer(workdir / "tokenizer")
    assert tokenizer.decode(tokenizer.encode("Beautiful is ✓")) == "Beautiful is ✓"
    assert conversion.from_workdir(workdir, target) == [f"wrote {target}: {architecture}"]
    assert files(target) == files(MODELS / name)


def test_parameters_are_read_back_in_their_dtype(tmp_path):
    conversion.to_workdir(MODELS / "qwen3", tmp_path / "run")
    _, arrays = hugging_face.read_model(MODELS / "qwen3")
    read = conversion.read_parameters(tmp_path / "run", read_config(tmp_path / "run"))
    assert jax.tree.structure(read) == jax.tree.structure(arrays)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(arrays), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), b)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_window", "qwen3_5"])
def test_load_reads_it_like_a_run(name, tmp_path):
    conversion.to_workdir(MODELS / name, tmp_path / "run")
    model, tokenizer, config = efficient_lm.load(tmp_path / "run", dtype="float32")
    reference = np.load(MODELS / f"{name}.npz")
    logits = np.asarray(model(reference["tokens"]).logits)
    error = np.abs(logits - reference["logits"]).max() / np.abs(reference["logits"]).max()
    assert error < 1e-4  # test_logits has the exact limits
    assert (tokenizer is None) == (name == "qwen3_window")
    assert config.model.max_length == 256


def test_folder_without_a_tokenizer_converts_and_says_so(tmp_path):
    workdir, target = tmp_path / "run", tmp_path / "out"
    lines = conversion.to_workdir(MODELS / "llama3", workdir)
    assert lines[0] == f"{MODELS / 'llama3'} has no tokenizer.json: converted without a tokenizer"
    assert not (workdir / "tokenizer").exists()
    lines = conversion.from_workdir(workdir, target)
    assert lines[0] == f"{workdir} has no tokenizer.json: exported without a tokenizer"
    assert (target / "model.safetensors").exists()


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharacterTokenizer("ab ")])
def test_a_tokenizer_of_ours_comes_back(tokenizer, tmp_path):
    conversion.to_workdir(MODELS / "qwen3_window", tmp_path / "run")
    tokenizer.save(tmp_path / "run/tokenizer")
    lines = conversion.from_workdir(tmp_path / "run", tmp_path / "out")
    assert "exported with a tokenizer that only efficient_lm reads" in lines[0]
    lines = conversion.to_workdir(tmp_path / "out", tmp_path / "again")
    assert len(lines) == 1 and lines[0].startswith("wrote ")
    assert type(load_tokenizer(tmp_path / "again/tokenizer")) is type(tokenizer)
    path = read_config(tmp_path / "again").data.tokenizer
    assert load_tokenizer(path).encode("ab a").tolist() == tokenizer.encode("ab a").tolist()


def test_fields_without_meaning_are_told(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(MODELS / "llama3", source)
    config = json.loads((source / "config.json").read_text()) | {"unsloth_fixed": True}
    (source / "config.json").write_text(json.dumps(config))
    lines = conversion.to_workdir(source, tmp_path / "run")
    assert "fields of config.json that have no meaning here: unsloth_fixed" in lines


def test_a_failed_conversion_leaves_nothing(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(MODELS / "llama3", source)
    (source / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 3 files"):
        conversion.to_workdir(source, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    conversion.to_workdir(MODELS / "llama3", tmp_path / "run")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "write", full)
    with pytest.raises(CheckpointError, match=r"cannot convert to .*/out: No space left"):
        conversion.from_workdir(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_only_new_folders_are_written(tmp_path):
    conversion.to_workdir(MODELS / "llama3", tmp_path / "run")
    for convert in (
        lambda: conversion.to_workdir(MODELS / "llama3", tmp_path / "run"),
        lambda: conversion.from_workdir(tmp_path / "run", tmp_path),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(CheckpointError, match="exists and is not empty; give a new folder"):
            convert()
        assert sorted(tmp_path.rglob("*")) == before


def test_a_run_of_ours_is_exported(tmp_path):
    model = ModelConfig(vocabulary_size=50, embed_dim=32, num_layers=3, max_length=64)
    config = Config.from_dict({"model": {**vars(model)}, "data": {"sequence_length": 64}})
    arrays = random_arrays(model)
    workdir = tmp_path / "run"
    newer = jax.tree.map(lambda array: array + 1, arrays)
    with Checkpointer(workdir, config.checkpointing) as checkpointer:
        state = {"parameters": newer, "average": arrays, "step": np.zeros((), np.int32)}
        checkpointer.save(7, state, iterator={}, config=config.to_dict(), wait=True)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    conversion.from_workdir(workdir, tmp_path / "out")
    again, read = hugging_face.read_model(tmp_path / "out")
    assert hugging_face.read_config(tmp_path / "out")["architectures"] == ["LlamaForCausalLM"]
    assert again.num_layers == 3 and again.dtype == "float32"
    assert jax.tree.all(jax.tree.map(np.array_equal, read, arrays))


def test_the_model_is_in_memory_once(tmp_path):
    model = ModelConfig(vocabulary_size=4096, embed_dim=256, num_layers=12, max_length=64)
    source = tmp_path / "source"
    source.mkdir()
    arrays = random_arrays(model)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    hugging_face.write_model(source, model, arrays)
    del arrays
    tracemalloc.start()
    try:
        conversion.to_workdir(source, tmp_path / "run")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Once, and what the writing threads hold of single arrays; a second copy would make it 2.
    assert peak < 1.8 * size


def test_missing_work_directories(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*/nothing/config.json"):
        conversion.from_workdir(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*/config.json"):
        conversion.from_workdir(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"modle": {}}')
    with pytest.raises(ConfigError, match=r"unknown field config.modle"):
        conversion.from_workdir(tmp_path, tmp_path / "out")


def convert(*arguments: str) -> subprocess.CompletedProcess:
    """Run the door."""
    return subprocess.run(
        [sys.executable, "-m", "efficient_lm.convert", *arguments],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_door_prints_lines_alone(tmp_path):
    done = convert(f"--from={MODELS / 'qwen3'}", f"--workdir={tmp_path / 'run'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wrote {tmp_path / 'run'}: 105,920 parameters (bfloat16)\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--workdir=x",), 2, "give --workdir=DIR and one of --from=HF_DIR and --to=HF_DIR"),
        (
            ("--workdir=x", "--from=nowhere"),
            4,
            "nowhere/config.json does not exist; give the folder of a Hugging Face model",
        ),
    ],
)
def test_errors_at_the_door_are_one_line(arguments, code, message):
    done = convert(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"error: {message}\n")
