"""Memory of the same steps on TPU chips that nobody need own, compiled ahead of time.

`python experiments/untied_ulysses/ahead.py --topology=v5p:2x2x2 --lengths 1048576 --out=x.json`
"""

import argparse
import json
import sys
from pathlib import Path

import run

from efficient_lm.config import Config
from efficient_lm.planning.compile import compile_program, train_program
from efficient_lm.planning.topologies import find_topology


def main() -> None:
    """Compile every row that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--topology", default="v5p:2x2x2")
    parser.add_argument("--layers", type=int, default=1, help="of the 8B model")
    parser.add_argument("--lengths", type=int, nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", default=["ulysses", "upipe8"])
    parser.add_argument("--remat", default="full")
    parser.add_argument("--attention", default="auto", help="implementation")
    arguments = parser.parse_args()
    topology = find_topology(arguments.topology)
    devices = len(topology.devices)
    values = {
        "command": " ".join(["experiments/untied_ulysses/ahead.py", *sys.argv[1:]]),
        "versions": run.versions(),
        "attention": arguments.attention,
        "remat": arguments.remat,
        "rows": [],
    }
    for length in arguments.lengths:
        for name in arguments.methods:
            fields = run.make_config("8b", length, 1, arguments.layers, **run.method(name, devices))
            fields["model"]["mixers"]["attention"]["implementation"] = arguments.attention
            fields["model"]["remat"] = arguments.remat
            fields["objective"]["chunk_logits"] = 2**26
            compiled = compile_program(train_program(Config.from_dict(fields), topology))
            row = {"what": "long context", "size": "8b", "layers": arguments.layers,
                   "devices": devices, "length": length, "method": name,
                   "device": arguments.topology.partition(":")[0],
                   "fits": compiled.fits, "temporary_bytes": compiled.temporaries,
                   "argument_bytes": compiled.arguments, "host_bytes": compiled.host,
                   "compile_seconds": round(compiled.seconds, 1)}  # fmt: skip
            values["rows"].append(row)
            arguments.out.write_text(json.dumps(values, indent=1) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
