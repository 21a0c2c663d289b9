"""The benchmark: rows with provenance, failures kept."""

import json

from pallas_kernels import bench


def test_rows_are_written_with_errors_beside_milliseconds(tmp_path, capsys):
    """A contestant that cannot run here is a row with its reason."""
    out = tmp_path / "results" / "attention.json"
    flags = ["--op=attention", f"--out={out}", "--cases=nanogpt_cpu", "--repeats=1"]
    assert bench.main([*flags, "--contestants=ours:xla,ours:cudnn"]) == 0
    report = json.loads(out.read_text())
    assert report["command"].startswith("python -m pallas_kernels.bench --op=attention")
    assert report["environment"]["versions"]["jax"]
    rows = {(row["contestant"], row["pass"]): row for row in report["rows"]}
    for label in ("forward", "forward_backward"):
        assert rows["ours:xla", label]["milliseconds"] > 0
        assert max(rows["ours:xla", label]["relative_errors"]) < 1e-5
        assert "needs gpu" in rows["ours:cudnn", label]["error"]
    assert "needs gpu" in capsys.readouterr().out


def test_unknown_case_is_told(tmp_path, capsys):
    assert bench.main(["--op=attention", f"--out={tmp_path / 'x'}", "--cases=nothing"]) == 2
    assert "known: gpt2_124m" in capsys.readouterr().err
