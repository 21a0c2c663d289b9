"""Figures are drawn from what there is: a run that was cut off, and rows that failed."""

import importlib.util
import json
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
# Rows of the CPU arm that a cut-off GPU arm might have, and what it would be called.
PARTIAL = {
    "two_mamba": ("h200.json", "part", ["text", "text"]),
    "ttt_kv_binding": ("h200.json", "part", ["speed", "speed"]),
    "gated_deltanet": ("h200_quality.json", "what", ["recall"]),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_a_figure_of_partial_results(name, tmp_path):
    spec = importlib.util.spec_from_file_location(
        f"{name}_figure", EXPERIMENTS / name / "figure.py"
    )
    figure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figure)
    file, key, parts = PARTIAL[name]
    results = tmp_path / "results"
    results.mkdir()
    whole = json.loads((EXPERIMENTS / name / "results/cpu.json").read_text())
    (results / "cpu.json").write_text(json.dumps(whole))
    rows = [row for row in whole["rows"] if row[key] == parts[0]][: len(parts)]
    failed = {k: rows[0][k] for k in (key, "method", "mixer", "form", "what") if k in rows[0]}
    rows = [*rows, failed | {"error": "out of memory"}]
    (results / file).write_text(json.dumps(whole | {"arm": "gpu", "rows": rows}))
    figure.HERE = tmp_path
    figure.main()
    assert "</svg>" in (tmp_path / "figure.svg").read_text()
