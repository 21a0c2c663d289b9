"""The 2Mamba experiment runs in small, and its models are equal in size."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from efficient_lm.inference.speed import state_bytes
from efficient_lm.model.definition import define

FOLDER = Path(__file__).parents[2] / "experiments/two_mamba"


def models():
    spec = importlib.util.spec_from_file_location("two_mamba_models", FOLDER / "models.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_both_parts_give_rows(tmp_path):
    out = tmp_path / "x.json"
    command = [sys.executable, str(FOLDER / "run.py"), "--arm=smoke", "--steps=2",
               "--methods", "two_mamba", f"--out={out}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, recall = json.loads(out.read_text())["rows"]
    assert 5 < text["bits_per_byte"] < 9 and len(text["losses"]) == 2
    assert set(recall["accuracy"]) == {"2", "4"}


def test_models_have_as_many_parameters_and_constant_states():
    module = models()
    run = module.ARMS["cpu"]["recall"]
    counts = []
    for method in module.METHODS:
        config = module.make_config(method, run)
        counts.append(define(config.model).count())
        short, long = (state_bytes(config.model, length) for length in (run.length, 2 * run.length))
        constant = method in ("two_mamba", "mamba_2s", "mamba2")
        assert (long == short) == constant, method
    assert max(counts) < 1.03 * min(counts)


def test_the_state_is_that_of_the_paper():
    """d (d + 1)^2 / 2 numbers for the sums of a head and, for a convolution of 2 tokens, 3 d."""
    module = models()
    run = module.ARMS["cpu"]["text"]
    d, heads = run.head_dim, run.embed_dim // run.head_dim
    numbers = heads * (d * (d + 1) ** 2 // 2 + 3 * d)
    segments = 1 + 3  # of the memory, and of the input that each convolution keeps
    found = state_bytes(module.make_config("two_mamba", run).model, run.length)
    assert found == 4 * run.num_layers * (numbers + segments)
