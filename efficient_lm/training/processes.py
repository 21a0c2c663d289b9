"""What the processes of a run tell each other, through the host; nothing to do for one process."""

import collections
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the store of keys has no public name

from efficient_lm import errors

# Whoever waits is freed by the watch over the processes, or by JAX's own, not by this limit.
_PATIENCE_MILLISECONDS = 24 * 3600 * 1000
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
