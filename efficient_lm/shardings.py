"""Show where every array lies: `python -m efficient_lm.shardings --config=configs/llama3.py:8b`.

Works for the devices of this host and, with --topology=v5p:8x8x8, for chips that nobody here owns.
"""

import json
from pathlib import Path

from absl import flags

from efficient_lm.cli import define_config_flag, run_door

read_config = define_config_flag()
TOPOLOGY = flags.DEFINE_string(
    "topology", "local", "Devices: local, or chips as v5p:8x8x8; an unknown one lists all."
)
OUT = flags.DEFINE_string("out", None, "Directory for shardings.json and shardings.png.")


def main() -> None:
    """Print each array's logical axes, split and bytes of a device; with --out keep and draw it."""
    config = read_config()
    import jax

    if TOPOLOGY.value != "local":
        jax.config.update("jax_platforms", "cpu")  # what is there is not what is asked about
    from efficient_lm.planning.placement import draw, placements, text
    from efficient_lm.planning.topologies import find_topology

    topology = find_topology(TOPOLOGY.value, max(config.parallel.dcn, 1))
    found = placements(config, topology)
    print(text(found))
    if OUT.value is not None:
        directory = Path(OUT.value)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "shardings.json").write_text(json.dumps(found, indent=1) + "\n")
        draw(found, directory / "shardings.png")
        print(f"wrote {directory / 'shardings.json'} and {directory / 'shardings.png'}")


if __name__ == "__main__":
    run_door(main)
