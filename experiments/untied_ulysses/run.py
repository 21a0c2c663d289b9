"""Untied Ulysses: time and memory of training steps at long contexts, method by method.

`python experiments/untied_ulysses/run.py --out=results/x.json` times Llama-3-8B layers on all GPUs;
`--scaling` times the 1B model over 1, 2, ... GPUs by fsdp; `--size=small --fake` needs no GPU.
Every row is a process of its own.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "jax-cuda13-plugin", "nvidia-cudnn-cu13")
SIZES = {
    "8b": {"embed_dim": 4096, "heads": 32, "keys": 8, "head_dim": 128, "hidden_dim": 14_336,
           "vocabulary": 128_256, "layers": 32},
    "1b": {"embed_dim": 2048, "heads": 32, "keys": 8, "head_dim": 64, "hidden_dim": 8192,
           "vocabulary": 128_256, "layers": 16},
    "small": {"embed_dim": 256, "heads": 32, "keys": 8, "head_dim": 8, "hidden_dim": 512,
              "vocabulary": 512, "layers": 2},
    "tiny": {"embed_dim": 32, "heads": 8, "keys": 4, "head_dim": 8, "hidden_dim": 64,
             "vocabulary": 96, "layers": 2},
}  # fmt: skip


def make_config(size: str, length: int, rows: int, layers: int | None, **parallel) -> dict:
    """Nested fields of Config: the recipe for long contexts, everything computed again."""
    shape = SIZES[size]
    attention = {
        "num_heads": shape["heads"], "num_key_value_heads": shape["keys"],
        "head_dim": shape["head_dim"], "rope": {"theta": 500_000.0},
    }  # fmt: skip
    return {
        "model": {
            "vocabulary_size": shape["vocabulary"],
            "embed_dim": shape["embed_dim"],
            "num_layers": layers or shape["layers"],
            "max_length": length,
            "mixers": {"attention": attention},
            "ffns": {"dense": {"hidden_dim": shape["hidden_dim"]}},
            "tie_embeddings": False,
            "dtype": "bfloat16" if size in ("8b", "1b") else "float32",
            "remat": "full",
            "ffn_tokens_at_once": 8192 if length > 65_536 else None,
        },
        "data": {"sequence_length": length, "batch_size": rows, "mask_across_documents": False},
        "objective": {"chunk_logits": 2**29},
        "parallel": {"data": 1} | parallel,
    }


def method(name: str, devices: int) -> dict:
    """Fields of config.parallel: "ulysses", "ring", or "upipe" with its heads at once."""
    if name == "ring":
        return {"ring": devices}
    if name == "ulysses":
        return {"sequence": devices}
    return {"sequence": devices, "heads_at_once": int(name.removeprefix("upipe"))}


def method_name(text: str) -> str:
    """One that `method` knows, on the command line."""
    if not re.fullmatch(r"ulysses|ring|upipe[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not ulysses, ring or upipeN, of N heads")
    return text


def versions() -> dict[str, str]:
    """Of the packages that matter."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Time every row that is asked for; the JSON is written again after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--devices", type=int, default=2, help="that share the tokens of a row")
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--layers", type=int, default=1, help="of the model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[131_072, 524_288, 1_048_576])
    parser.add_argument("--methods", nargs="+", type=method_name,
                        default=["ulysses", "upipe2", "upipe8", "ring"])  # fmt: skip
    parser.add_argument("--steps", type=int, default=2, help="timed; 0: compile only")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing new after")
    parser.add_argument("--fake", action="store_true", help="fake devices of the CPU")
    arguments = parser.parse_args()
    began = time.perf_counter()
    values = {"command": " ".join(["experiments/untied_ulysses/run.py", *sys.argv[1:]]),
              "versions": versions(), "rows": []}  # fmt: skip

    def add(row: dict, config: dict, devices: int, steps: int) -> None:
        if time.perf_counter() - began > arguments.seconds:
            row |= {"error": "no time left"}
        else:
            given = {"config": config, "devices": devices, "steps": steps,
                     "fake_devices": devices if arguments.fake else 0}  # fmt: skip
            row |= run_child(given)
        values["rows"].append(row)
        values["seconds"] = round(time.perf_counter() - began, 1)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(values, indent=1) + "\n")
        print(json.dumps(row), flush=True)

    if arguments.scaling:
        size, length, rows = ("tiny", 64, 2) if arguments.fake else ("1b", 4096, 4)
        counts = [2**i for i in range(arguments.devices.bit_length())]
        for devices in [*counts, 1]:  # one device first and last
            config = make_config(size, length, rows * devices, None, fsdp=devices)
            row = {"what": "scaling", "size": size, "devices": devices, "length": length,
                   "rows": rows * devices}  # fmt: skip
            add(row, config, devices, 10)
        return
    for length in arguments.lengths:
        for name in arguments.methods:
            parallel = method(name, arguments.devices)
            config = make_config(arguments.size, length, 1, arguments.layers, **parallel)
            row = {"what": "long context", "size": arguments.size, "layers": arguments.layers,
                   "devices": arguments.devices, "length": length, "method": name}  # fmt: skip
            add(row, config, arguments.devices, arguments.steps)


def run_child(given: dict) -> dict:
    """The row that `step.py` prints, or the end of what it said."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in paths if p))
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    done = subprocess.run(
        [sys.executable, str(HERE / "step.py")], input=json.dumps(given), capture_output=True,
        text=True, env=environment,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        return json.loads(lines[-1])
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    return {"error": f"code {done.returncode}; {' '.join(last)[:300]}"}


if __name__ == "__main__":
    main()
