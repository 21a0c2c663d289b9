"""Train: `python -m efficient_lm.train --config=configs/quickstart.py --workdir=runs/x`."""

import json
from pathlib import Path
from typing import Any

from absl import flags

from efficient_lm.cli import define_config_flag, run_door
from efficient_lm.config import Config
from efficient_lm.distributed import define_flags
from efficient_lm.errors import ConfigError

read_config = define_config_flag()
processes = define_flags()
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; made, or resumed.")
PROFILE = flags.DEFINE_bool("profile", False, "Write a jax.profiler trace of a few steps.")


def main() -> None:
    """Train or resume the run; then print a sample and where the report is."""
    config = read_config()
    if not WORKDIR.value:
        raise ConfigError("no --workdir is given; name a directory: --workdir=runs/quickstart")
    with processes():
        from efficient_lm.training.loop import train

        workdir = Path(WORKDIR.value)
        summary = train(config, workdir, profile=PROFILE.value)
        finish(config, workdir, summary)


def finish(config: Config, workdir: Path, summary: dict[str, Any]) -> None:
    """Sample from the trained model, keep the sample, and write the report.

    Several processes must all come here; process 0 alone writes.
    """
    import jax

    import efficient_lm
    from efficient_lm.training.report import write_report

    training = config.training
    if training.sample_tokens:
        model, tokenizer, _ = efficient_lm.load(workdir)
        text = efficient_lm.generate(
            model,
            tokenizer,
            training.sample_prompt,
            max_new_tokens=training.sample_tokens,
            temperature=0.8,
        )
        if jax.process_index() != 0:
            return
        print(f"\nA sample after step {summary['step']}:\n\n{training.sample_prompt}{text}\n")
        row = {"step": summary["step"], "prompt": training.sample_prompt, "text": text}
        with (workdir / "samples.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    if jax.process_index() == 0:
        print(f"report: {write_report(workdir)}")


if __name__ == "__main__":
    run_door(main)
