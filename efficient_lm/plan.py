"""Plan: does a step fit, and how fast could it be, on a topology that nobody need own.

`python -m efficient_lm.plan --config=configs/llama3.py:8b --topology=v5p:8x8x8`
"""

from pathlib import Path

from absl import flags

from efficient_lm.cli import define_config_flag, run_door
from efficient_lm.errors import ConfigError

read_config = define_config_flag()
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chips to compile for, as v5p:8x8x8, or local; an unknown one lists all."
)
DECODE = flags.DEFINE_bool("decode", False, "Plan a step of decoding instead of training.")
BATCH = flags.DEFINE_integer("batch", None, "Rows decoded at once; default: one a row of the mesh.")
CONTEXT = flags.DEFINE_integer("context", None, "Tokens of cache a row; default: sequence_length.")
OUT = flags.DEFINE_string("out", None, "Directory for plan.json and plan.png.")


def main() -> None:
    """Print the tables and, with --out, keep them; a step that does not fit is a result: exit 0."""
    config = read_config()
    if TOPOLOGY.value is None:
        raise ConfigError("no --topology is given; name one: --topology=v5p:8x8x8, or local")
    import jax

    if TOPOLOGY.value != "local":
        jax.config.update("jax_platforms", "cpu")  # what is there is not what is planned for
    from efficient_lm.planning.planner import make_plan
    from efficient_lm.planning.report import write_report
    from efficient_lm.planning.tables import text
    from efficient_lm.planning.topologies import find_topology

    topology = find_topology(TOPOLOGY.value, max(config.parallel.dcn, 1))
    decode = None
    if DECODE.value:
        decode = (
            BATCH.value or len(topology.devices),
            CONTEXT.value or config.data.sequence_length,
        )
    plan = make_plan(config, topology, decode=decode)
    print(text(plan))
    if OUT.value is not None:
        for path in write_report(plan, Path(OUT.value)):
            print(f"wrote {path}")


if __name__ == "__main__":
    run_door(main)
