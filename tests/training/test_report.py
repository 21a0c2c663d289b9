"""The report is whole and self-contained whatever the run has written so far."""

import base64
import json
import re
import xml.etree.ElementTree

import pytest

from efficient_lm.training.metrics import MetricsWriter
from efficient_lm.training.report import write_report

VALUES = {
    "loss": 2.5,
    "bits_per_byte": 1.25,
    "tokens_per_second": 51_200.0,
    "mfu": 0.31,
    "learning_rate": 1e-3,
    "gradient_norm": 0.5,
}


def write_metrics(workdir, valid=True, values=VALUES):
    with MetricsWriter(workdir, tensorboard=False) as writer:
        for step in (10, 20, 30):
            writer.write(step, "train", values)
            if valid:
                writer.write(step, "valid", {"loss": 2.25, "bits_per_byte": 1.5})


def write_rest(workdir):
    config = {"model": {"embed_dim": 192, "layers": [["attention", {"window": 8}]]}}
    (workdir / "config.json").write_text(json.dumps(config))
    sample = {"step": 30, "prompt": "def ", "text": "f(x):\n  return x < 1 & <b>"}
    (workdir / "samples.jsonl").write_text(json.dumps(sample) + '\n{"step": 4')
    summary = {"parameters": 2_712_345, "device": "CPU <9>", "devices": 8, "run_seconds": 131.0}
    (workdir / "summary.json").write_text(json.dumps(summary | {"compile_seconds": 8.9}))


def test_a_whole_run_is_shown_without_other_files(tmp_path):
    write_metrics(tmp_path)
    write_rest(tmp_path)
    page = write_report(tmp_path).read_text()
    for text in ("2.2500", "1.500", "2.71M", "51.2k", "31.0%", "8 × CPU &lt;9&gt;", "2 min 11 s",
                 "8.9 s", "embed_dim", "return x &lt; 1 &amp; &lt;b&gt;", "jax"):  # fmt: skip
        assert text in page, text
    sources = re.findall(r'(?:src|href)="(.*?)"', page)
    assert len(sources) == 6
    for source in sources:
        head, data = source.split(",")
        assert head == "data:image/svg+xml;base64"  # nothing is fetched
        xml.etree.ElementTree.fromstring(base64.b64decode(data))
    assert "url(" not in page


@pytest.mark.parametrize("missing", ["everything", "valid", "metrics", "all but one point", "nan"])
def test_what_is_missing_is_left_out(tmp_path, missing):
    if missing == "valid":
        write_metrics(tmp_path, valid=False)
    if missing == "metrics":
        write_rest(tmp_path)
    if missing == "all but one point":
        with MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.write(1, "train", {"loss": 0.0})
    if missing == "nan":
        write_metrics(tmp_path, values=VALUES | {"loss": float("nan"), "mfu": float("inf")})
    page = write_report(tmp_path).read_text()
    curves = {"everything": 0, "valid": 6, "metrics": 0, "all but one point": 1, "nan": 5}
    assert page.count("<img") == curves[missing]
    assert ("in progress" in page) == (missing != "metrics")
    assert page.endswith("</html>\n")
