"""Tuned parameters as data: one JSON file for each op and device kind, found by shape.

`<op>/tuned/<device kind>.json` is a list of {"implementation": name, "shape": {axis: size},
"parameters": {...}}; the kind is lower-case with underscores, such as nvidia_h200.json.
"""

import functools
import json
from importlib import resources


def file_name(kind: str) -> str:
    """The file of a device kind, such as "NVIDIA H200"."""
    return kind.lower().replace(" ", "_").replace("/", "_") + ".json"


def lookup(op: str, implementation: str, kind: str, shape: dict[str, int]) -> dict | None:
    """Parameters tuned for exactly this shape on this device kind; None: use a heuristic."""
    for entry in _entries(op, kind):
        if entry["implementation"] == implementation and entry["shape"] == shape:
            return entry["parameters"]
    return None


@functools.cache
def _entries(op: str, kind: str) -> list[dict]:
    path = resources.files("pallas_kernels") / op / "tuned" / file_name(kind)
    return json.loads(path.read_text()) if path.is_file() else []
