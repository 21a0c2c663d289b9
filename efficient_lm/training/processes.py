"""What the processes of a run on several hosts tell each other; nothing to do for one process."""

import json
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils


def barrier(name: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast(numbers: Sequence[int]) -> list[int]:
    """The numbers that process 0 gave."""
    return [int(n) for n in multihost_utils.broadcast_one_to_all(np.array(numbers, np.int32))]


def gather(value: dict) -> list[dict]:
    """The JSON-able values of all processes, in their order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(text.size, np.int32))
    padded = np.full(sizes.max(), ord(" "), np.uint8)
    padded[: text.size] = text
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]
