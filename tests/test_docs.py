"""What the documents say is true: generated parts, links, commands, names, versions."""

import importlib.util
import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from docs import build, pictures, tables
from efficient_lm import registry
from efficient_lm.config import MESH_AXES, Config
from efficient_lm.model.definition import define
from efficient_lm.parallel.check import check_mesh
from efficient_lm.parallel.mesh import make_mesh

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/numbers.md")
TEXTS = {name: (ROOT / name).read_text() for name in DOCUMENTS}
EVERYTHING = "\n".join(TEXTS.values())


def test_generated_parts_are_up_to_date():
    for path in build.DOCUMENTS:
        text = path.read_text()
        folder = path.parent.relative_to(ROOT).as_posix()
        assert build.document(text, folder) == text, f"{path}: run python -m docs.build"
    assert pictures.outdated() == [], "run python -m docs.build"


def test_the_quickstart_shown_is_that_of_the_config():
    result = json.loads(tables.QUICKSTART.read_text())
    config = runpy.run_path(str(ROOT / "configs/quickstart.py"))["get_config"]()
    assert result["summary"]["step"] == config.training.steps, (
        "run python experiments/quickstart/run.py, then python -m docs.build"
    )


def test_every_block_and_picture_is_shown():
    texts = [path.read_text() for path in build.DOCUMENTS]
    shown = [match[2] for text in texts for match in build.MARKER.finditer(text)]
    assert sorted(shown) == sorted(build.BLOCKS)
    files = sorted(path for path in pictures.FOLDER.iterdir())
    assert files == sorted(pictures.PICTURES)
    assert all(path.relative_to(ROOT).as_posix() in TEXTS["README.md"] for path in files)


def test_an_unknown_block_is_refused_and_old_content_replaced():
    with pytest.raises(ValueError, match="nonsense"):
        build.document("<!-- generated: nonsense -->\n<!-- end of nonsense -->")
    old = "a\n<!-- generated: explanation -->\nold\n<!-- end of explanation -->\nb"
    new = build.document(old)
    assert "old" not in new and new.startswith("a\n") and new.endswith("\nb")
    assert build.document(new) == new


def test_missing_results_give_no_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "QUICKSTART", tmp_path / "none.json")
    for name, block in build.BLOCKS.items():
        if name != "explanation":
            assert block() == tables.NOT_MEASURED, name


def test_losing_and_failed_rows_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    folder = tmp_path / "pallas_kernels/results"
    folder.mkdir(parents=True)
    same = '"op": "attention", "case": "odd", "pass": "forward"'
    (folder / "x.json").write_text(
        '{"environment": {"device": {"kind": "NVIDIA H200"}}, "rows": ['
        f'{{{same}, "contestant": "ours:auto", "auto": "attention: xla; not cudnn: why",'
        ' "milliseconds": 4.0, "relative_errors": [1e-3, 2e-3]},'
        f'{{{same}, "contestant": "jax.nn:cudnn", "milliseconds": 1.0, "relative_errors": null}},'
        f'{{{same}, "contestant": "jax.nn:xla", "error": "OOM"}},'
        '{"op": "attention", "case": "large", "pass": null, "contestant": "ours:auto",'
        ' "error": "ValueError: too | large"}]}'
    )
    lines = tables.kernels().splitlines()
    assert "| xla | 4.00 | jax.nn:cudnn | 1.00 | 0.25x | 2.0e-03 |" in lines[2]
    assert "failed: ValueError: too / large" in lines[3]
    folder = tmp_path / "experiments/nanogpt/results"
    folder.mkdir(parents=True)
    (folder / "cpu.json").write_text(
        '{"arm": "cpu", "device": "2 x CPU", "results": [{"what": "ours", "name": "seed 0",'
        ' "valid_loss": 2.0, "step_seconds": 0.1234, "seconds": 1234.5},'
        ' {"what": "nanoGPT", "error": "no torch"}]}'
    )
    lines = tables.quality().splitlines()
    assert "| 2 x CPU | cpu | ours, seed 0 | 2.0000 | - | 123 | 1,234 |" in lines[2]
    assert "| nanoGPT | failed: no torch |" in lines[3]
    assert tables.training_speed() == tables.NOT_MEASURED


def test_numbers_have_three_digits_and_no_exponent():
    values = {0.01234: "0.0123", 4.5: "4.50", 99.94: "99.9", 123.4: "123", 12345.0: "12,345"}
    assert {value: tables.three_digits(value) for value in values} == values
    assert tables.milliseconds(None) == "-"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_exist(name):
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[name])
    missing = [link for link in links
               if "://" not in link
               and not ((ROOT / name).parent / link.partition("#")[0]).exists()]  # fmt: skip
    assert missing == []


def test_commands_exist():
    modules = set(re.findall(r"python -m ([\w.]+)", EVERYTHING))
    assert {"efficient_lm.train", "efficient_lm.generate", "docs.build"} <= modules
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    scripts = re.findall(r"python ((?:\w+/)+\w+\.py)", EVERYTHING)
    configs = re.findall(r"--config=(configs/\w+\.py)", EVERYTHING)
    assert [path for path in [*scripts, *configs] if not (ROOT / path).is_file()] == []


LINES = {
    " ".join(f"python -m {module} {flags}".split())
    for text in TEXTS.values()
    for module, flags in re.findall(
        r"python -m (efficient_lm\.(?:train|plan|shardings|sweep)) ((?:--[^\s'`\"]+\s*)+)",
        text.replace("\\\n", " "),
    )
}


NOT_TO_PASTE = ("embed_dims", "model.layers=")  # a mistake on show, and a mixer that is not there


@pytest.mark.parametrize("line", sorted(LINES))
def test_lines_to_paste_are_accepted(line):
    """Every flag exists and every field has a value that the config takes."""
    arguments = [
        *line.split()[1:],
        "--dry_run" if "efficient_lm.sweep" in line else "--print_config",
    ]
    if not any(part in line for part in NOT_TO_PASTE):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_the_lines_of_scale_fit_eight_devices():
    section = TEXTS["README.md"].partition("## Scale\n")[2].partition("\n## ")[0]
    lines = [line for line in sorted(LINES) if "--config.parallel" in line
             and line.split()[-1] in section]  # fmt: skip
    assert len(lines) == 2
    for line in lines:
        arguments = [*line.split()[1:], "--print_config"]
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        config = Config.from_dict(json.loads(done.stdout))
        check_mesh(config, define(config.model), make_mesh(config.parallel))


def test_every_axis_is_in_the_table_of_the_readme():
    rows = re.findall(r"^\| `(\w+)` \|", TEXTS["README.md"], re.MULTILINE)
    assert sorted(rows) == sorted(MESH_AXES)


def test_extras_exist():
    extras = {
        name for group in re.findall(r"'\.\[([\w,]+)\]'", EVERYTHING) for name in group.split(",")
    }
    assert extras and extras <= set(project()["optional-dependencies"])


def test_the_table_of_methods_has_what_is_registered_and_no_more():
    rows = re.findall(r"^\| (mixer|feed-forward|objective) \| (.*) \| (\w+) \|$",
                      TEXTS["README.md"], re.MULTILINE)  # fmt: skip
    kinds = {"mixer": registry.MIXERS, "feed-forward": registry.FEED_FORWARDS,
             "objective": registry.OBJECTIVES}  # fmt: skip
    for kind, known in kinds.items():
        done = [text for row_kind, text, status in rows if (row_kind, status) == (kind, "done")]
        assert set(re.findall(r"`(\w+)`", " ".join(done))) == set(known), kind


def project() -> dict:
    """The table `project` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["title"].startswith("efficient_lm") and citation["authors"]
    latest = re.search(r"^## (\d+\.\d+\.\d+)", TEXTS["CHANGELOG.md"], re.MULTILINE)[1]
    assert str(citation["version"]) == latest == project()["version"]
    assert citation["license"] == project()["license"]["text"] == "Apache-2.0"
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revision = next(repo["rev"] for repo in hooks if "ruff" in repo["repo"]).lstrip("v")
    assert any(f"ruff>={revision}" in name for name in project()["optional-dependencies"]["test"])
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_ci_script_runs_the_test_line_of_the_readme():
    script = (ROOT / ".ci/run").read_text()
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=True)
    pattern = re.search(r'grep -m1 -x "(.*)" README.md', script)[1]
    lines = [line for line in TEXTS["README.md"].splitlines() if re.fullmatch(pattern, line)]
    assert lines == ["pip install -e '.[test]' && pytest -n auto --dist loadfile"]
