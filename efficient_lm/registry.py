"""Names of everything that a config can choose by name, and where it lives.

Adding a method touches one new file and one line here. Values are "module:attribute" and are
imported when first asked for, so that listing names costs nothing.
"""

import difflib
import importlib
from typing import Any

from efficient_lm.errors import ConfigError

MIXERS = {
    "attention": "efficient_lm.mixers.attention:Attention",
    "gated_deltanet": "efficient_lm.mixers.gated_deltanet:GatedDeltaNet",
    "ttt": "efficient_lm.mixers.ttt:TTT",
    "two_mamba": "efficient_lm.mixers.two_mamba:TwoMamba",
    "kda": "efficient_lm.mixers.kda:KimiDeltaAttention",
    "linear_attention": "efficient_lm.mixers.linear_attention:LinearAttention",
    "mamba2": "efficient_lm.mixers.mamba2:Mamba2",
}
FEED_FORWARDS = {
    "dense": "efficient_lm.ffn.dense:Dense",
    "none": "efficient_lm.ffn.dense:NoFeedForward",
}
OBJECTIVES = {
    "autoregressive": "efficient_lm.objectives.autoregressive:autoregressive",
}


def suggest(name: str, known) -> str:
    """ "did you mean `x`?" for the nearest known name, or the whole list when none is near."""
    return _nearest(name, known) or "known: " + ", ".join(sorted(known))


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else ""


def resolve(table: dict[str, str], name: str, what: str) -> Any:
    """The object that `name` stands for in `table`; ConfigError with the nearest name if none."""
    if name not in table:
        raise ConfigError(f"unknown {what} {name!r}; {suggest(name, table)}")
    module, attribute = table[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def mixer(name: str):
    """Sequence mixer class; its `Options` is the frozen dataclass of its config fields."""
    return resolve(MIXERS, name, "mixer")


def feed_forward(name: str):
    """Feed-forward class; its `Options` is the frozen dataclass of its config fields."""
    return resolve(FEED_FORWARDS, name, "feed-forward")


def objective(name: str):
    """Objective factory: (ObjectiveConfig) -> objective(model, batch, key) -> (loss, metrics)."""
    return resolve(OBJECTIVES, name, "objective")


def check_implementation(options: Any, path: str) -> None:
    """ConfigError where `options.implementation` is none of `options.op`, before anything runs.

    A tuple of names is what the op takes besides one name. Options without `op` have no such field.
    """
    if not hasattr(options, "op"):
        return
    given, rows = options.implementation, []
    if options.op is not None:
        table = importlib.import_module(f"pallas_kernels.{options.op}.support").TABLE
        rows = [row.name for row in table]
    names = given if isinstance(given, (tuple, list)) else (given,)
    wrong = [name for name in names if name not in rows]
    if given == "auto" or (names and not wrong):
        return
    allowed = ["auto", *rows]
    near = _nearest(str(wrong[0]), allowed) if wrong else ""
    raise ConfigError(
        f"{path}.implementation={given!r} is unknown; allowed: {', '.join(map(repr, allowed))}"
        + (near and f"; {near}")
    )
