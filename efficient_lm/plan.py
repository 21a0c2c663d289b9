"""Plan: does a step fit, and how fast could it be, on a topology that nobody need own.

`python -m efficient_lm.plan --config=configs/llama3.py:8b --topology=v5p:8x8x8`
"""

import shlex
import sys
from pathlib import Path

from absl import flags

from efficient_lm.cli import define_config_flag, run_door
from efficient_lm.errors import ConfigError

read_config = define_config_flag()
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chips to compile for, as v5p:8x8x8, or local; an unknown one lists all."
)
DECODE = flags.DEFINE_bool("decode", False, "Plan a step of decoding instead of training.")
BATCH = flags.DEFINE_integer("batch", None, "Rows decoded at once; default: one a device.")
CONTEXT = flags.DEFINE_integer("context", None, "Tokens of cache a row; default: sequence_length.")
SEARCH = flags.DEFINE_bool(
    "search", False, "Rank mesh shapes, microbatches and remat policies; compile the best few."
)
OUT = flags.DEFINE_string("out", None, "Directory for plan.json and plan.png (or search.json).")


def main() -> None:
    """Print the tables and, with --out, keep them.

    That a step does not fit is a result like others: exit code 0, `memory.fits` false in the JSON.
    """
    config = read_config()
    if TOPOLOGY.value is None:
        raise ConfigError("no --topology is given; name one: --topology=v5p:8x8x8, or local")
    if SEARCH.value and DECODE.value:
        raise ConfigError("--search ranks training steps; leave out --decode")
    import jax

    if TOPOLOGY.value != "local":
        jax.config.update("jax_platforms", "cpu")  # what is there is not what is planned for
    from efficient_lm.planning.topologies import find_topology

    topology = find_topology(TOPOLOGY.value, max(config.parallel.dcn, 1))
    directory = None if OUT.value is None else Path(OUT.value)
    paths = (_search if SEARCH.value else _plan)(config, topology, directory)
    for path in paths:
        print(f"wrote {path}")


def _plan(config, topology, directory: Path | None) -> list[Path]:
    """One plan, with advice where it does not fit; the files written."""
    from efficient_lm.planning.advice import advise, advise_decoding
    from efficient_lm.planning.planner import make_plan
    from efficient_lm.planning.report import write_report
    from efficient_lm.planning.tables import text

    decode = None
    if DECODE.value:
        rows = BATCH.value or len(topology.devices)
        decode = (rows, CONTEXT.value or config.data.sequence_length)
    plan = make_plan(config, topology, decode=decode)
    if not plan["memory"]["fits"]:
        plan["advice"] = advise_decoding(plan) if decode else advise(config, topology, plan)
    plan["command"] = _command()
    print(text(plan))
    return [] if directory is None else write_report(plan, directory)


def _command() -> str:
    """The line that made the plan, without where it is kept."""
    given = [a for a in sys.argv[1:] if not a.startswith(("--out=", "--noout"))]
    return shlex.join(["python", "-m", "efficient_lm.plan", *given])


def _search(config, topology, directory: Path | None) -> list[Path]:
    """The ranked variants; the files written."""
    from efficient_lm.planning.report import write_search
    from efficient_lm.planning.search import search
    from efficient_lm.planning.tables import search_text

    rows = search(config, topology)
    print(search_text(rows))
    found = {"command": _command(), "rows": rows}
    return [] if directory is None else write_search(found, directory)


if __name__ == "__main__":
    run_door(main)
