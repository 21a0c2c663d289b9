"""The errors and the compilation that experiments/recurrence_speed states, at small sizes."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.recurrence_speed import compile_gpu, compile_tpu, errors, shapes
from experiments.recurrence_speed.ours import inputs, measure
from pallas_kernels._core.recurrence_bench import Case
from pallas_kernels._core.testing import relative_error

SMALL = shapes.Shape("small", (1, 9, 1, 2, 8))


def test_the_truth_is_the_reference_in_float64():
    """Written by hand, with its gradients; half of a pass wrong would be half of the error."""
    tokens, cotangent = inputs(SMALL)
    tokens, cotangent = jax.tree.map(lambda x: x.astype(jnp.float32), (tokens, cotangent))
    truth = errors.recurrence(*(np.asarray(x, np.float64) for x in (*tokens, cotangent)))
    found = errors.SIDES["ours: recurrence, fp32"](tokens, cotangent)
    for name, x in zip(errors.NAMES, found, strict=True):
        assert relative_error(x, truth[name]) < 1e-6, name


def test_a_decay_of_each_key_feature_is_timed():
    *times, last = measure(SMALL, "kda")
    assert [row["pass"] for row in times] == ["forward", "forward_backward"]
    assert all(row["milliseconds"] > 0 for row in times)
    assert max(last["relative_errors"]) < 2e-2


def test_without_the_peer_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert errors.main([f"--out={tmp_path / 'x'}"]) == 2
    error = capsys.readouterr().err
    assert "needs torch and transformers" in error and error.count("\n") == 1


def test_without_a_gpu_is_one_line(tmp_path):
    run = pathlib.Path(shapes.__file__).with_name("run.py")
    done = subprocess.run(
        [sys.executable, run, f"--out={tmp_path / 'x'}", "--shapes", "qwen3_5_8k"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: these kernels need a GPU; this is cpu\n"
    assert not (tmp_path / "x").exists()


def test_kernels_that_do_not_compile_are_rows(tmp_path, monkeypatch):
    """Rows that a file has are kept, and one that fails does not end the others."""
    pytest.importorskip("libtpu")
    few = Case("few", 1, 64, 1, 1, 128, 128, delta=True)
    wide = Case("wide", 1, 64, 1, 1, 512, 512, delta=True)
    monkeypatch.setattr(compile_tpu, "CASES", {"gated_delta_rule": (few, wide)})
    monkeypatch.setattr(compile_tpu.testing, "TPU_TOPOLOGIES", ("v5e:2x2",))
    monkeypatch.setattr(compile_tpu, "vmem_capacity", lambda topology: 2**27)
    out = tmp_path / "rows.json"
    kept = {"op": "gated_delta_rule", "case": "few", "chip": "v5e", "pass": "forward_backward"}
    kept |= {"shape": {"H": 1, "N": 1, "K": 128, "V": 128}, "vmem_capacity": 2**27, "kernels": []}
    out.write_text(json.dumps({"rows": [kept]}))
    assert compile_tpu.main([f"--out={out}"]) == 1
    first, *rest = json.loads(out.read_text())["rows"]
    assert first == kept
    assert [(row["case"], row["pass"]) for row in rest[:2]] == [
        ("few", "forward"), ("wide", "forward"),
    ]  # fmt: skip
    (kernel,) = rest[0]["kernels"]
    assert 0 < kernel["vmem_used"] < kernel["vmem_limit"]
    assert "numbers in the states" in rest[1]["error"]


def test_compiling_for_a_gpu_says_what_it_needs(tmp_path, capsys):
    assert compile_gpu.main([f"--plugin={tmp_path}", f"--out={tmp_path / 'x'}"]) == 2
    error = capsys.readouterr().err
    assert "xla_cuda_plugin.so is not there" in error and error.count("\n") == 1


def test_what_a_library_prints_is_read(capfd):
    report = (
        "ptxas info    : Compiling entry function 'kernel' for 'sm_90a'\n"
        "    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers\n"
    )
    with compile_gpu.printed() as lines:
        os.write(1, report.encode())  # past Python's own stdout
    print("afterwards")
    assert compile_gpu.PTXAS.findall("".join(lines)) == [("12", "8", "168")]
    assert capfd.readouterr().out == "afterwards\n"
