"""Choice of an implementation from a declared support table, with reasons for those passed over.

An op declares one `Implementation` each in the order of preference and calls `choose` with its
facts: an object with at least `target` and `dtype`, plus what the op's own conditions look at.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("pallas_kernels")


class ImplementationError(ValueError):
    """An implementation that was asked for is unknown, or cannot run here."""


@dataclass(frozen=True)
class Condition:
    """`holds(facts)` must be true; `needs` completes "it needs ..." for people."""

    needs: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Implementation:
    """One row of a support table.

    function: "module:attribute", imported when chosen.
    platforms, dtypes: where it runs; an empty `dtypes` means all.
    conditions: without which it cannot run. advice: without which "auto" passes it over, although
    it can be asked for by name.
    """

    name: str
    function: str
    platforms: tuple[str, ...]
    dtypes: tuple[str, ...] = ()
    conditions: tuple[Condition, ...] = ()
    advice: tuple[Condition, ...] = ()

    def obstacles(self, facts) -> tuple[str, ...]:
        """What it needs and `facts` lack; empty when it can run. Off its platforms, only that."""
        if facts.target.platform not in self.platforms:
            return (f"{' or '.join(self.platforms)} (this is {facts.target.platform})",)
        missing = []
        if self.dtypes and facts.dtype not in self.dtypes:
            missing.append(f"dtype {' or '.join(self.dtypes)} (given {facts.dtype})")
        missing += [condition.needs for condition in self.conditions if not condition.holds(facts)]
        return tuple(missing)

    def reservations(self, facts) -> tuple[str, ...]:
        """What "auto" wants before it takes this one, and `facts` lack."""
        return tuple(condition.needs for condition in self.advice if not condition.holds(facts))

    def load(self) -> Callable:
        """The function itself."""
        module, attribute = self.function.split(":")
        return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Choice:
    """The implementation chosen and, by name, why each one before it in the order was not."""

    op: str
    implementation: Implementation
    passed_over: dict[str, str]

    @property
    def name(self) -> str:
        return self.implementation.name

    def __str__(self) -> str:
        reasons = "".join(f"; not {name}: {why}" for name, why in self.passed_over.items())
        return f"{self.op}: {self.name}{reasons}"


def choose(
    op: str,
    table: tuple[Implementation, ...],
    facts,
    implementation: str | tuple[str, ...] = "auto",
) -> Choice:
    """The first implementation that can run: of the table for "auto", else of the names given.

    Raises ImplementationError, with reasons and alternatives: a name is unknown, or none can run.
    """
    rows = {row.name: row for row in table}
    auto = implementation == "auto"
    several = isinstance(implementation, tuple | list)
    names = tuple(implementation) if several else (implementation,)
    if not auto and (not names or not all(name in tuple(rows) for name in names)):
        raise ImplementationError(
            f"{op}: unknown implementation {implementation!r}; allowed: 'auto', "
            f"{', '.join(map(repr, rows))} or a tuple of these"
        )
    passed_over = {}
    for name in rows if auto else names:
        obstacles = rows[name].obstacles(facts)
        reservations = rows[name].reservations(facts) if auto else ()
        if not obstacles and not reservations:
            choice = Choice(op, rows[name], passed_over)
            _log_once(str(choice))
            return choice
        verb = "needs" if obstacles else "is chosen only with"
        passed_over[name] = f"it {verb} " + " and ".join(obstacles or reservations)
    reasons = "; ".join(f"{name!r} cannot run: {why}" for name, why in passed_over.items())
    able = [name for name, row in rows.items() if not row.obstacles(facts)]
    raise ImplementationError(f"{op}: {reasons}; can run here: {', '.join(able) or 'none'}")


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)
