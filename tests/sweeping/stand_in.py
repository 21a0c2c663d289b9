"""Stands in for a training run: `python stand_in.py -m efficient_lm.train --workdir=`.

Seed 1 fails, unless the file `mended` lies beside this one; seed 2 runs until it is told to stop.
"""

import json
import signal
import sys
import time
from pathlib import Path

flags = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:] if "=" in a)
seed, workdir = int(flags["config.training.seed"]), Path(flags["workdir"])
mended = Path(__file__).with_name("mended").exists()
workdir.mkdir(parents=True, exist_ok=True)
loss = float(flags["config.optimizer.learning_rate"]) + seed


def write(step):
    with (workdir / "metrics.jsonl").open("a") as file:
        print(json.dumps({"step": step, "split": "valid", "loss": loss}), file=file)


def stop(number, frame):
    write(4)
    print("SIGTERM: saved step 4")
    raise SystemExit(128 + number)


signal.signal(signal.SIGTERM, stop)
if seed == 1 and not mended:
    print("step 3: something odd\nerror: the disk is full", file=sys.stderr)
    raise SystemExit(3)
write(0)
(workdir / "started").touch()
while seed == 2 and not mended:
    time.sleep(0.01)
write(10)
(workdir / "summary.json").write_text(json.dumps({"step": 10, "tokens_per_second": 7.0}))
