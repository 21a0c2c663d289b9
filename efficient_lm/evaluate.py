"""Evaluate: `python -m efficient_lm.evaluate --workdir=runs/x`; prints a table, writes JSON.

Scores every token of the validation split once. `--paths=file` scores other text, and the fields of
`--config` change how: `--config.evaluation.stride=64`, `--config.data.sequence_length=1024`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import flags

from efficient_lm.cli import define_override_flag, run_door
from efficient_lm.config import Config
from efficient_lm.distributed import define_flags
from efficient_lm.errors import CheckpointError, ConfigError

OVERRIDE = define_override_flag()
processes = define_flags()
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run or of a converted checkpoint.")
PATHS = flags.DEFINE_list("paths", [], "Text files, folders or globs to score as a whole.")
SPLIT = flags.DEFINE_enum("split", "valid", ["valid", "train"], "Part of the run's own data.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest one.")
DTYPE = flags.DEFINE_string("dtype", None, "float32 or bfloat16; default: that of the config.")
BATCHES = flags.DEFINE_integer(
    "batches", None, "At most so many batches, spread over the split.", lower_bound=1
)
JSON = flags.DEFINE_string("json", None, "Where to write; default: WORKDIR/evaluation.json.")


def main() -> None:
    """Evaluate, write, print."""
    if not WORKDIR.value:
        raise ConfigError("no --workdir is given; name the directory of a run: --workdir=runs/x")
    with processes():
        import jax

        from efficient_lm.evaluation.run import evaluate_run

        result = evaluate_run(
            WORKDIR.value,
            split=SPLIT.value,
            override=_override,
            step=STEP.value,
            dtype=DTYPE.value,
            limit=BATCHES.value,
        )
        if jax.process_index() == 0:
            _write(result)


def _write(result: dict[str, Any]) -> None:
    """As JSON, and as a table."""
    path = Path(JSON.value or Path(WORKDIR.value) / "evaluation.json")
    try:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {path} ({error}); give another --json") from None
    _print_table(result)
    print(path)


def _override(config: Config) -> Config:
    """The config with the fields of --config and the text of --paths."""
    config = OVERRIDE(config)
    if not PATHS.value:
        return config
    paths = tuple(PATHS.value)
    data = dataclasses.replace(config.data, source="text", paths=paths, valid_paths=paths)
    return dataclasses.replace(config, data=data)


def _print_table(result: dict[str, Any]) -> None:
    """Metrics, with the loss by position in the window at powers of two."""
    from rich.console import Console
    from rich.table import Table

    metrics, data = result["metrics"], result["data"]
    source = ", ".join(data["paths"]) or data["source"]
    table = Table(title=f"{result['workdir']}, step {result['step']}: {result['split']} {source}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    digits = {"loss": 4, "perplexity": 3, "bits_per_byte": 4, "accuracy": 4, "tokens": 0,
              "bytes": 0, "tokens_per_second": 0}  # fmt: skip
    for name, places in digits.items():
        if metrics[name] is not None:
            table.add_row(name.replace("_", " "), f"{metrics[name]:,.{places}f}")
    for name, value in metrics.get("recall", {}).items():
        table.add_row(f"recall {name}".replace("_", " "), f"{value:,.6g}")
    losses, tokens, end = metrics["position_loss"], metrics["position_tokens"], 1
    while end // 2 < len(losses):
        group = slice(end // 2, end)
        scored = sum(tokens[group])
        if scored:
            total = sum(l * n for l, n in zip(losses[group], tokens[group], strict=True) if n)
            last = min(end, len(losses)) - 1
            place = f"{last}" if last == end // 2 else f"{end // 2} to {last}"
            table.add_row(f"loss at position {place}", f"{total / scored:.4f}")
        end *= 2
    Console().print(table)


if __name__ == "__main__":
    run_door(main)
