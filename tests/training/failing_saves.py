"""Run by test_processes: one of two processes whose second save fails midway in one of them.

`python failing_saves.py PROCESS PORT DIRECTORY FAILING`: FAILING cannot write files above 100 kB.
"""

import resource
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from efficient_lm import distributed
from efficient_lm.config import CheckpointingConfig
from efficient_lm.errors import CheckpointError
from efficient_lm.training.checkpoint import Checkpointer

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_platforms", "cpu")
SIZE = 400_000


def main(process: int, port: str, directory: Path, failing: int) -> None:
    place = distributed.Place(f"localhost:{port}", 2, process, None, "of the test")
    limits = distributed.Limits(join=30.0, peer=30.0)
    with distributed.processes(place, limits), Checkpointer(directory, CheckpointingConfig()) as c:
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
        values = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
        sharding = jax.NamedSharding(mesh, jax.P("x"))
        state = {"p": {"x": jax.make_array_from_callback((SIZE,), sharding, values.__getitem__)}}
        c.save(1, state, iterator={}, config={}, wait=True)
        if process == failing:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            c.save(2, state, iterator={}, config={}, wait=True)
        except CheckpointError as error:
            print(f"failed: {error}", flush=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        c.save(3, state, iterator={}, config={}, wait=True)
        print(c.steps(), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
