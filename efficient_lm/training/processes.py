"""What the processes of a run tell each other, through the host; nothing to do for one process."""

import collections
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the store of keys has no public name

from efficient_lm import errors

# Whoever waits is freed by the watch over the processes, or by JAX's own, not by this limit.
_PATIENCE_MILLISECONDS = 24 * 3600 * 1000
_POLL_SECONDS = 1.0
_rounds: dict[str, itertools.count] = collections.defaultdict(itertools.count)


def gather(name: str, value: Any) -> list[Any]:
    """The JSON-able values of all processes, in their order; all must call it.

    No device takes part, so that threads may call it, each with a `name` of its own.
    """
    if jax.process_count() == 1:
        return [value]
    client, index = jax_distributed.global_state.client, jax.process_index()
    number = next(_rounds[name])
    key = f"efficient_lm/{name}/{number}"
    if index != 0:
        client.key_value_set(f"{key}/{index}", json.dumps(value))
        return json.loads(client.blocking_key_value_get(f"{key}/all", _PATIENCE_MILLISECONDS))
    values = [json.loads(json.dumps(value))]
    for process in range(1, jax.process_count()):
        text = client.blocking_key_value_get(f"{key}/{process}", _PATIENCE_MILLISECONDS)
        values.append(json.loads(text))
    client.key_value_set(f"{key}/all", json.dumps(values))
    if number:  # everyone is in this round, so the last one has been read
        client.key_value_delete(f"efficient_lm/{name}/{number - 1}")
    return values


def attempt(
    name: str, function: Callable[[], None], describe: Callable[[Exception], errors.UserError]
) -> errors.UserError | None:
    """Call `function` in all processes; in all, the first of their failures, or None."""
    failure = None
    try:
        function()
    except Exception as error:
        failure = describe(error)
        failure.__cause__ = error
    told = [line for line in gather(name, failure and str(failure)) if line]
    return failure or (errors.CheckpointError(told[0]) if told else None)


def wait_for(name: str, result: Callable[[float], Any]) -> Any:
    """`result(seconds)`, which raises TimeoutError until it is there, in all processes.

    Its failure in one of them ends the waiting of the others, who would wait for that one, by a
    RuntimeError. `name` must be new each time.
    """
    if jax.process_count() == 1:
        return result(_PATIENCE_MILLISECONDS / 1000)
    client = jax_distributed.global_state.client
    key = f"efficient_lm/failed/{name}"
    while True:
        began = time.monotonic()
        try:
            return result(_POLL_SECONDS)
        except Exception as error:
            waiting = isinstance(error, TimeoutError)
            if not waiting or time.monotonic() - began < _POLL_SECONDS / 2:  # its own time limit
                line = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                client.key_value_set(f"{key}/{jax.process_index()}", line)
                raise
        for name, line in client.key_value_dir_get(key):
            raise RuntimeError(f"process {name.rpartition('/')[2]}: {line}")


def from_first(name: str, function: Callable[[], Any]) -> Any:
    """What `function` returns (JSON-able) in process 0, which alone calls it, in all processes.

    A UserError that it raises is raised in all of them.
    """
    if jax.process_count() == 1:
        return function()
    outcome: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            outcome = {"value": function()}
        except errors.UserError as error:
            outcome = {"error": type(error).__name__, "message": str(error)}
    outcome = gather(name, outcome)[0]
    if "error" in outcome:
        raise getattr(errors, outcome["error"])(outcome["message"])
    return outcome["value"]
