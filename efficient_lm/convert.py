"""Door: convert checkpoints of Hugging Face to work directories of ours, and back.

python -m efficient_lm.convert --from=HF_DIR --workdir=DIR
python -m efficient_lm.convert --workdir=DIR --to=HF_DIR
"""

import jax
from absl import flags

from efficient_lm.cli import run_door
from efficient_lm.errors import ConfigError
from efficient_lm.interop import conversion

FROM = flags.DEFINE_string("from", None, "Folder of a Hugging Face model to convert.")
TO = flags.DEFINE_string("to", None, "New folder for a Hugging Face model.")
WORKDIR = flags.DEFINE_string("workdir", None, "Work directory: new with --from, read with --to.")


def main() -> None:
    """One of the two directions."""
    if not WORKDIR.value or bool(FROM.value) == bool(TO.value):
        raise ConfigError("give --workdir=DIR and one of --from=HF_DIR and --to=HF_DIR")
    jax.config.update("jax_platforms", "cpu")  # no accelerator is needed, so none is taken
    if FROM.value:
        lines = conversion.to_workdir(FROM.value, WORKDIR.value)
    else:
        lines = conversion.from_workdir(WORKDIR.value, TO.value)
    print("\n".join(lines))


if __name__ == "__main__":
    run_door(main)
