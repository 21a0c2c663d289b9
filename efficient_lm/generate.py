"""Generate text: `python -m efficient_lm.generate --workdir=runs/x --prompt='def '`.

The prompt and what follows it are streamed to stdout; a line about the speed goes to stderr.
"""

import sys
from pathlib import Path

from absl import flags

from efficient_lm.cli import run_door
from efficient_lm.errors import ConfigError, DataError

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run or of a converted checkpoint.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest one.")
DTYPE = flags.DEFINE_string("dtype", None, "float32 or bfloat16; default: that of the config.")
PROMPT = flags.DEFINE_string("prompt", "", "Text to go on from.")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File with the prompt; - is stdin.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 200, "At most so many tokens.")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 is greedy.")
TOP_K = flags.DEFINE_integer("top_k", None, "Draw from the k most likely tokens.")
TOP_P = flags.DEFINE_float("top_p", None, "Draw from the most likely tokens of this probability.")
MIN_P = flags.DEFINE_float("min_p", None, "Leave out tokens below this share of the likeliest.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.")
STOP = flags.DEFINE_multi_string("stop", [], "Text that ends the generation; may be repeated.")


def main() -> None:
    """Load, generate, stream."""
    if not WORKDIR.value:
        raise ConfigError("no --workdir is given; name the directory of a run: --workdir=runs/x")
    prompt = _prompt()
    from efficient_lm.inference.engine import Generator
    from efficient_lm.inference.load import load

    model, tokenizer, _ = load(WORKDIR.value, step=STEP.value, dtype=DTYPE.value)
    generator = Generator(
        model,
        tokenizer,
        [prompt],
        max_new_tokens=MAX_NEW_TOKENS.value,
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        min_p=MIN_P.value,
        seed=SEED.value,
        stop=STOP.value,
    )
    sys.stdout.write(prompt)
    for (piece,) in generator.stream():
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    result = generator.result()
    reason = result.finish_reasons[0]
    note = f" (the context of {model.config.max_length} tokens is full)"
    print(f"{result.speed}; ended by {reason}{note * (reason == 'context')}", file=sys.stderr)


def _prompt() -> str:
    """The prompt from the flag or the file; DataError where it cannot be read."""
    if PROMPT_FILE.value is None:
        return PROMPT.value
    if PROMPT.value:
        raise ConfigError("both --prompt and --prompt_file are given; give one of them")
    try:
        if PROMPT_FILE.value == "-":
            return sys.stdin.read()
        return Path(PROMPT_FILE.value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read --prompt_file={PROMPT_FILE.value}: {error}") from None


if __name__ == "__main__":
    run_door(main)
