"""From a sweep file to its runs: checked settings, stable names, commands."""

import hashlib
import json
import os
import re
import runpy
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from efficient_lm.config import Config
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.sweeping.expressions import Sweep

INDEX = "runs.json"
_LONGEST_NAME = 100  # characters of the part for people


@dataclass(frozen=True)
class Run:
    """One training run of a sweep."""

    name: str  # its directory in that of the sweep
    config: str  # file[:argument]
    settings: Mapping[str, Any]  # by dotted field; JSON-able
    steps: int
    values: Mapping[str, Any] = field(default_factory=dict, compare=False)  # of the whole config

    def arguments(self, workdir: Path | str) -> list[str]:
        """What follows `python` to train it in `workdir`, the directory of the sweep."""
        fields = [
            f"--config.{path}={_flag(value)}"
            for path, value in self.settings.items()
            if value is not None  # as in the config: `_check_settable`
        ]
        return ["-m", "efficient_lm.train", f"--config={self.config}", *fields,
                f"--workdir={Path(workdir) / self.name}"]  # fmt: skip

    def command(self, workdir: Path) -> list[str]:
        """The same with the interpreter that runs this."""
        return [sys.executable, *self.arguments(workdir)]


def load_sweep(path: str) -> Sweep:
    """What `get_sweep()` of the file returns; ConfigError where there is none."""
    sweep = _function(path, "get_sweep", "--sweep")()
    if not isinstance(sweep, Sweep):
        raise ConfigError(f"get_sweep() of {path} returned {sweep!r}; it must return a Sweep")
    return sweep


def plan(sweep: Sweep) -> tuple[Run, ...]:
    """The runs in their order, each settings once; ConfigError names the first wrong field."""
    file, _, argument = sweep.config.partition(":")
    get_config = _function(file, "get_config", "the config of the sweep")
    config_dict = get_config(argument) if argument else get_config()
    base = Config.from_config_dict(config_dict).to_dict()
    name = os.path.normpath(file) + (f":{argument}" if argument else "")
    runs = {}
    for settings in sweep.runs:
        run = _make_run(name, base, settings)
        runs.setdefault(run.name, run)
    if not runs:
        raise ConfigError("the sweep has no runs; give get_sweep() at least one setting")
    return tuple(runs.values())


def _make_run(config: str, base: Mapping[str, Any], settings: Mapping[str, Any]) -> Run:
    """A run from settings that are checked as the config of every door is."""
    given = {path: _plain(settings[path]) for path in sorted(settings)}  # whatever order was given
    values = json.loads(json.dumps(base))
    for path, value in given.items():
        _check_settable(path, value, base)
        _set(values, path, value)
    checked = Config.from_dict(values).to_dict()
    settings = {path: _jsonable(_get(checked, path)) for path in given}
    identity = json.dumps({"config": config, "settings": settings}, sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    readable = ",".join(
        f"{label}={re.sub('[^A-Za-z0-9.+_-]+', '-', _flag(settings[path])).strip('-')}"
        for path, label in labels(settings).items()
    )
    name = f"{readable[:_LONGEST_NAME] or 'base'}-{digest}"
    return Run(name, config, settings, checked["training"]["steps"], _jsonable(checked))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups by dotted names."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def labels(fields: Iterable[str]) -> dict[str, str]:
    """The shortest endings of dotted fields that tell them apart."""
    fields, found = list(fields), {}
    for path in fields:
        parts = path.split(".")
        for count in range(1, len(parts) + 1):
            label = ".".join(parts[-count:])
            if not any(f != path and f"x.{f}".endswith(f".{label}") for f in fields):
                break
        found[path] = label
    return found


def _check_settable(field: str, value: Any, base: Mapping[str, Any]) -> None:
    """ConfigError for what `--config.field=value` could not say."""
    inner: Any = base
    for part in field.split("."):
        if not isinstance(inner, Mapping) or part not in inner:
            return _require_group(field, inner, part)
        inner = inner[part]
    if value is None and inner is not None:
        raise ConfigError(
            f"config.{field}=None: a flag cannot take a value back; leave it out of the config"
        )
    return None


def _require_group(field: str, inner: Any, part: str) -> None:
    """Leave unknown fields of dataclasses to `Config.from_dict`; name those of free groups."""
    if isinstance(inner, Mapping) and not inner:
        raise ConfigError(
            f"config.{field} is not in the config; flags set only fields that it has: "
            f"sweep the whole group, or give {part} a value there"
        )


def _function(path: str, name: str, what: str):
    """The function `name` of a Python file; ConfigError lists the files there are."""
    file = Path(path)
    if not file.is_file():
        there = sorted(str(f) for f in file.parent.glob("*.py"))
        files = f"; files there: {', '.join(there)}" if there else ""
        raise ConfigError(f"{what}={path}: there is no file {file}{files}")
    namespace = runpy.run_path(str(file))
    if name not in namespace:
        raise ConfigError(f"{path} has no function {name}()")
    return namespace[name]


def read_index(directory: Path) -> dict[str, Run]:
    """Every run that was ever started in this directory of a sweep, by name."""
    path = directory / INDEX
    if not path.exists():
        return {}
    try:
        return {name: Run(name, **entry) for name, entry in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError):
        raise CheckpointError(
            f"{path} is damaged; delete it (finished runs of the sweep file are found without it)"
        ) from None


def write_index(directory: Path, runs: Sequence[Run]) -> None:
    """Add runs to those of `read_index`."""
    entries = {
        run.name: {"config": run.config, "settings": run.settings, "steps": run.steps}
        for run in [*read_index(directory).values(), *runs]
    }
    replace_text(directory / INDEX, json.dumps(entries, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file that is whole at any moment; CheckpointError where it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path} ({error.strerror}); give another --workdir"
        ) from None


def _plain(value: Any) -> Any:
    """NumPy numbers as Python's; lists and ranges as tuples."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple, range)):
        return tuple(_plain(v) for v in value)
    return value


def _jsonable(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def _flag(value: Any) -> str:
    """A value as the text of a flag."""
    if isinstance(value, str):
        return value
    return repr(_tuples(value))


def _tuples(value: Any) -> Any:
    """Lists of JSON as tuples, which is what fields of several values hold."""
    if isinstance(value, list):
        return tuple(_tuples(v) for v in value)
    if isinstance(value, Mapping):
        return {name: _tuples(v) for name, v in value.items()}
    return value


def _set(values: dict[str, Any], field: str, value: Any) -> None:
    """Set a dotted field; a group that is missing is made, for `Config.from_dict` to name."""
    *groups, last = field.split(".")
    for group in groups:
        inner = values.setdefault(group, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"unknown field config.{field}; {group} is not a group of fields")
        values = inner
    values[last] = value


def _get(values: Mapping[str, Any], field: str) -> Any:
    for part in field.split("."):
        values = values[part]
    return values
