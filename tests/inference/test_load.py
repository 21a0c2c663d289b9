"""The notebook's three names, loading by step, dtype and average, and the generate door."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import efficient_lm as elm
from efficient_lm.errors import CheckpointError, ConfigError, UserError
from efficient_lm.model.definition import define, unstack
from efficient_lm.training.checkpoint import open_for_reading


def test_the_three_names_of_a_notebook(workdir, run_config):
    model, tokenizer, config = elm.load(str(workdir))
    assert config.to_dict() == run_config.to_dict()
    tokens = np.stack([tokenizer.encode("def a"), tokenizer.encode("class")])
    output = model(tokens)
    assert output.logits.shape == (2, 5, 256) and output.logits.dtype == jnp.float32
    for same in (tokens.tolist(), jnp.asarray(tokens), tokens.astype(np.int64)):
        np.testing.assert_array_equal(model(same).logits, output.logits)
    text = elm.generate(model, tokenizer, "def ", max_new_tokens=20)
    assert isinstance(text, str) and text == "".join(
        elm.stream(model, tokenizer, "def ", max_new_tokens=20)
    )


def test_arrays_are_those_saved_with_layers_apart(workdir, run_config):
    model, _, _ = elm.load(workdir)
    scanned = define(run_config.model)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), scanned.parameters,
        is_leaf=lambda leaf: hasattr(leaf, "axes"),
    )  # fmt: skip
    saved = open_for_reading(workdir).restore_part("parameters", shapes)
    jax.tree.map(np.testing.assert_array_equal, model.arrays, unstack(saved))
    assert "period" not in model.arrays["stack"]
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    expected = jax.jit(lambda arrays, t: scanned.bind(arrays)(t).logits)(saved, tokens)
    np.testing.assert_allclose(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_step_average_and_dtype_are_chosen(tmp_path, save_run, run_config):
    values = iter([0.01, 0.02, 0.03, 0.04])
    parts = {}
    for name in ("parameters", "average"):
        parts[name] = lambda shape, name=name: np.full(shape, current[name])
    for step in (1, 2):
        current = {"parameters": next(values), "average": next(values)}
        save_run(tmp_path, run_config, parts, steps=(step,))

    def scale(**options):
        return elm.load(tmp_path, **options)[0].arrays["final_norm"]["scale"]

    assert float(scale()[0]) == pytest.approx(0.04)
    assert float(scale(average=False)[0]) == pytest.approx(0.03)
    assert float(scale(step=1)[0]) == pytest.approx(0.02)
    model, _, config = elm.load(tmp_path, dtype="bfloat16")
    assert config.model.dtype == model.config.dtype == "bfloat16"
    assert model.arrays["embedding"].dtype == jnp.bfloat16
    assert model.arrays["final_norm"]["scale"].dtype == jnp.float32
    with pytest.raises(ConfigError, match="dtype='float16'; allowed"):
        elm.load(tmp_path, dtype="float16")
    with pytest.raises(CheckpointError, match="there are: 1, 2"):
        elm.load(tmp_path, step=7)


def test_what_is_no_run_is_one_clear_line(tmp_path, workdir, run_config):
    with pytest.raises(CheckpointError, match="no work directory"):
        elm.load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        elm.load(tmp_path)
    copy = shutil.copytree(workdir, tmp_path / "copy")
    wider = dataclasses.replace(run_config.model, embed_dim=32)
    wrong = dataclasses.replace(run_config, model=wider)
    (copy / "config.json").write_text(json.dumps(wrong.to_dict()))
    with pytest.raises(CheckpointError, match="does not fit this config"):
        elm.load(copy)
    (copy / "config.json").write_text('{"modle": {}}')
    with pytest.raises(ConfigError, match=r"copy/config\.json: unknown field config\.modle"):
        elm.load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        elm.load(copy)


def test_a_model_without_a_tokenizer_loads_and_says_so(tmp_path, workdir):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    shutil.rmtree(copy / "tokenizer")
    model, tokenizer, _ = elm.load(copy)
    assert tokenizer is None
    with pytest.raises(UserError, match="this model has no tokenizer"):
        elm.generate(model, tokenizer, "x")


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([[1, 2], [3]], "tokens has rows of different lengths"),
        ([1, 2], r"tokens has shape \(2,\)"),
        ([[0.5]], "must be .B, T. integers"),
        (np.zeros((2, 0), int), r"tokens has shape \(2, 0\); give at least one row and token"),
        ([[256]], r"token ids lie in \[256, 256\]; this model has ids 0 to 255"),
        ([[0] * 65], "tokens are 65 long; the context of this model is 64"),
    ],
)
def test_tokens_that_do_not_fit_are_named(models, tokens, words):
    with pytest.raises(UserError, match=words):
        models["full"](tokens)


def test_segments_and_positions_are_those_of_the_tokens(models):
    for name in ("segment_ids", "positions"):
        with pytest.raises(UserError, match=rf"{name} has shape \(1, 2\); it must be that of"):
            models["full"]([[1, 2, 3]], **{name: [[1, 2]]})


def test_the_public_names_are_listed_and_others_are_not_there():
    assert {"load", "generate", "stream", "Model", "Config"} <= set(dir(elm))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        elm.lode  # noqa: B018


def door(*arguments, **options):
    """(exit code, stdout, stderr) of the generate door."""
    program = (
        "import jax; jax.config.update('jax_platforms', 'cpu'); import runpy; "
        "runpy.run_module('efficient_lm.generate', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, **options
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_the_door_streams_what_the_api_generates(workdir, tmp_path):
    flags = [f"--workdir={workdir}", "--max_new_tokens=20", "--seed=3", "--stop=zzz", "--stop=qqq"]
    model, tokenizer, _ = elm.load(workdir)
    expected = "def " + elm.generate(
        model, tokenizer, "def ", max_new_tokens=20, seed=3, stop=["zzz", "qqq"]
    )
    code, out, error = door(*flags, "--prompt_file=-", input=b"def ")
    assert (code, out) == (0, expected + "\n")
    assert re.search(r"decode [\d,]+ tokens/s \(19 tokens in .*; ended by length$", error.strip())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--workdir=/nowhere/run"], 4, "no work directory /nowhere/run"),
        (["--workdir="], 2, "no --workdir is given"),
        (["--workdir=RUN", "--prompt=" + "x" * 64], 2, "prompt 0 has 64 tokens"),
    ],
)
def test_the_door_ends_with_one_line(workdir, arguments, code, words):
    arguments = [argument.replace("RUN", str(workdir)) for argument in arguments]
    returned, out, error = door(*arguments)
    assert (returned, out) == (code, "")
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
