"""Notebooks are those of their readable twins, and run."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from colab import build

ROOT = Path(__file__).parents[1]
TWINS = build.twins()
# Fewer steps, so that the test is short; every cell runs. Then pictures, and what is printed.
SHORT = {
    "quickstart": (
        ("STEPS = 300", "STEPS = 12"),
        3,
        ("did you mean 'embed_dim'?", "temperature 0.5", "bits per byte"),
    ),
    "linear_attention": (
        ("TRIALS = 64", "TRIALS = 8"),
        4,
        ("newest value under the key and no other: True", "half-lives", "65,536 tokens"),
    ),
}


@pytest.mark.parametrize("twin", TWINS, ids=lambda path: path.stem)
def test_notebook_is_that_of_its_twin(twin):
    assert twin.with_suffix(".ipynb").read_text() == build.notebook(twin.read_text()), (
        "run python -m colab.build"
    )


def test_every_notebook_has_a_twin():
    assert sorted(build.FOLDER.glob("*.ipynb")) == [path.with_suffix(".ipynb") for path in TWINS]


def test_an_unknown_kind_of_cell_is_refused():
    with pytest.raises(ValueError, match="nonsense"):
        build.cells("# %% [nonsense]\nx = 1\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_notebook_runs(name, tmp_path, monkeypatch):
    (old, new), pictures, lines = SHORT[name]
    text = (build.FOLDER / f"{name}.ipynb").read_text()
    assert text.count(old) == 1
    notebook = nbformat.reads(text.replace(old, new), as_version=4)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert shown.count("image/png") == pictures
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    assert [line for line in lines if line not in printed] == []
    assert name != "quickstart" or (tmp_path / "runs/notebook/metrics.jsonl").is_file()
