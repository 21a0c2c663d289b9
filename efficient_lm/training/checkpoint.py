"""Checkpoints: written in the background, complete or ignored, checked before they are used."""

import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from efficient_lm.config import CheckpointingConfig
from efficient_lm.errors import CheckpointError, ProcessError
from efficient_lm.training import manifest, processes, retention, state_tree, storage

_SAVING, _DELETED = ".saving", ".deleted"  # suffixes of directories that are no checkpoints


@dataclass(frozen=True)
class Restored:
    """What `restore` found: the state on its devices, and the rest as plain data."""

    step: int
    state: Any
    iterator: dict
    config: dict
    metrics: dict
    versions: dict


class CheckpointReader:
    """The checkpoints of a run, read only; `open_for_reading` checks that there are any.

    `warn` gets one line for each checkpoint that is passed over. `found_step` is the step of the
    checkpoint that was chosen last, or None.
    """

    found_step: int | None = None

    def __init__(self, workdir: str | Path, *, warn: Callable[[str], None] = logging.warning):
        self.directory = storage.local_path(workdir) / "checkpoints"
        self._warn = warn
        self._damaged: set[int] = set()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; their bytes are not checked."""
        return sorted(step for step, suffix in self._listing() if not suffix)

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
        """The newest good checkpoint (or that of `step`) as a pytree like `abstract_state`.

        Leaves of `abstract_state` are ShapeDtypeStructs or arrays; each array is put where the
        leaf's sharding says (the first device if it has none), whatever the mesh was that saved
        it. A damaged checkpoint is named by `warn` and the one before it is taken. Returns None
        when there is no checkpoint at all. Raises CheckpointError when none is good, when the
        state does not fit (naming the arrays), or when a newer format wrote it.
        """
        wanted = state_tree.by_part(abstract_state)
        found = self._newest_good(list(wanted), step)
        if found is None:
            return None
        step, content = found
        self._check_fit(step, content["parts"], wanted, cast=False)
        arrays = self._load(step, wanted)
        leaves = [arrays[part][path] for part, path in state_tree.paths(abstract_state)]
        return Restored(
            step=step,
            state=jax.tree.unflatten(jax.tree.structure(abstract_state), leaves),
            iterator=self._iterator(step, content["iterators"]),
            config=content["config"],
            metrics=content["metrics"],
            versions=content["versions"],
        )

    def restore_part(self, name: str, abstract_part: Any, step: int | None = None) -> Any:
        """One top-level entry of the state, such as "parameters", without reading the others.

        Like `restore`, but arrays are cast where a leaf asks for another floating dtype. Raises
        CheckpointError also when there is no checkpoint.
        """
        wanted = state_tree.by_part({name: abstract_part})
        found = self._newest_good([name], step)
        if found is None:
            raise CheckpointError(f"no checkpoint in {self.directory}; train the run first")
        step, content = found
        if name not in content["parts"]:
            raise CheckpointError(
                f"checkpoint {self._path(step)} has no part {name!r}; "
                f"it has: {', '.join(content['parts'])}"
            )
        self._check_fit(step, {name: content["parts"][name]}, wanted, cast=True)
        arrays = self._load(step, wanted)
        leaves = [arrays[part][path] for part, path in state_tree.paths({name: abstract_part})]
        return jax.tree.unflatten(jax.tree.structure(abstract_part), leaves)

    def parts(self, step: int | None = None) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """{part: {array path: shape and dtype}} of the newest readable checkpoint, or of `step`."""
        found = self._newest_good([], step)
        if found is None:
            raise CheckpointError(f"no checkpoint in {self.directory}; train the run first")
        return {
            part: {path: jax.ShapeDtypeStruct(tuple(shape), jax.numpy.dtype(dtype))
                   for path, (shape, dtype) in table.items()}
            for part, table in found[1]["parts"].items()
        }  # fmt: skip

    def _path(self, step: int, suffix: str = "") -> Path:
        return self.directory / f"{step}{suffix}"

    def _iterator(self, step: int, states: list[dict]) -> dict:
        """This process's data position; any one when all are equal."""
        if len(states) == jax.process_count():
            return states[jax.process_index()]
        if all(state == states[0] for state in states):
            return states[0]
        raise CheckpointError(
            f"checkpoint {self._path(step)} holds the data positions of {len(states)} processes, "
            f"which differ; run with {len(states)} processes instead of {jax.process_count()}"
        )

    def _listing(self) -> list[tuple[int, str]]:
        """(step, suffix) of every directory that is or may become a checkpoint."""
        if not self.directory.is_dir():
            return []
        pattern = re.compile(rf"(\d+)({re.escape(_SAVING)}|{re.escape(_DELETED)}|)")
        matches = (pattern.fullmatch(path.name) for path in self.directory.iterdir())
        return [(int(m[1]), m[2]) for m in matches if m]

    def _newest_good(self, parts: list[str], step: int | None) -> tuple[int, dict] | None:
        """(step, manifest) of the newest checkpoint whose files are as saved; the same on all
        processes."""
        self.found_step = None
        found: list[tuple[int, dict]] = []

        def choose() -> int | None:
            chosen, reasons = self._search(parts, step)
            if chosen is None and reasons:
                reason = "; ".join(reasons)
                raise CheckpointError(f"no good checkpoint in {self.directory}: {reason}")
            found.extend([chosen] if chosen else [])
            return chosen[0] if chosen else None

        self.found_step = processes.from_first("checkpoint", choose)
        if self.found_step is None:
            return None
        return found[0] if found else (self.found_step, manifest.read(self._path(self.found_step)))

    def _search(self, parts: list[str], step: int | None):
        """((step, manifest) or None, why newer checkpoints were passed over)."""
        reasons = []
        for candidate, suffix in sorted(self._listing(), reverse=True):
            if suffix == _DELETED or (step is not None and candidate != step):
                continue
            path = self._path(candidate, suffix)
            if suffix == _SAVING:  # never was a checkpoint, so a run may start without one
                self._warn(f"checkpoint {path} is passed over: its save was cut off, or still runs")
                continue
            try:
                content = manifest.read(path)
                manifest.verify(path, content, parts)
            except manifest.Damaged as damage:
                reasons.append(f"{path.name}: {damage}")
                self._damaged.add(candidate)
                self._warn(f"checkpoint {path} is passed over: {damage}")
            else:
                return (candidate, content), reasons
        if step is not None and not reasons:
            reasons = [f"{step}: not there; there are: {', '.join(map(str, self.steps()))}"]
        return None, reasons

    def _check_fit(self, step: int, saved: dict, wanted: state_tree.Parts, *, cast: bool) -> None:
        tables = {part: state_tree.table(leaves) for part, leaves in wanted.items()}
        lines = manifest.differences(state_tree.flat(saved), state_tree.flat(tables), cast=cast)
        if lines:
            raise CheckpointError(
                f"checkpoint {self._path(step)} does not fit this config; give the config that "
                "wrote it or another --workdir:\n  " + "\n  ".join(lines)
            )

    def _load(self, step: int, wanted: state_tree.Parts) -> state_tree.Parts:
        """Arrays by part and path, placed as the leaves of `wanted` say."""
        directory = self._path(step) / manifest.ARRAYS
        targets = jax.tree.map(state_tree.abstract, state_tree.without_empty(wanted))
        try:
            loaded = storage.orbax().load_checkpointables(directory, targets)
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {directory.parent} is as it was saved, yet cannot be read: "
                f"{storage.first_line(error)}"
            ) from error
        return {
            part: {
                path: state_tree.like(loaded.get(part, {}).get(path), leaf)
                for path, leaf in leaves.items()
            }
            for part, leaves in wanted.items()
        }


class Checkpointer(CheckpointReader):
    """Writes and reads the checkpoints of one run; a context manager that waits at its end.

    A step is written to `checkpoints/<step>.saving/` and renamed to `checkpoints/<step>/` when
    every file and its checksum are on the disk, so a directory with a bare number is complete.
    The last `keep_last` and the `keep_best` lowest in `best_metric` are kept. Raises
    CheckpointError when the directory cannot be written.
    """

    def __init__(
        self,
        workdir: str | Path,
        config: CheckpointingConfig,
        *,
        warn: Callable[[str], None] = logging.warning,
    ):
        super().__init__(workdir, warn=warn)
        self._config = config
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._saves = 0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f".writable_{jax.process_index()}"
            probe.touch()
            probe.unlink()
            if jax.process_index() == 0:
                self._finish_renames()
        except OSError as error:
            raise CheckpointError(
                f"cannot write to {self.directory} ({error.strerror}); give another --workdir"
            ) from None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if jax.process_count() > 1 and kind not in (None, SystemExit):
            self._executor.shutdown(wait=False)  # the other processes may be gone
        else:
            self.close()

    def save(
        self,
        step: int,
        state: Any,
        *,
        iterator: dict,
        config: dict,
        metrics: dict | None = None,
        wait: bool = False,
    ) -> None:
        """Save `state` (a mapping, NamedTuple or dataclass of pytrees of arrays) as of `step`.

        Returns when the arrays are copied to the host, so they may be donated or deleted; the
        rest happens in the background, one save at a time. A save that fails in the background
        leaves the earlier checkpoints alone, is cleaned up and told to `warn`; with `wait`, and in
        `wait()` and `close()`, it raises CheckpointError.
        """
        self._join()
        content = {
            "step": step,
            "config": config,
            "iterators": processes.gather("iterators", iterator),
            "metrics": metrics or {},
        }
        parts = state_tree.by_part(state)
        content["parts"] = {part: state_tree.table(leaves) for part, leaves in parts.items()}
        needed = sum(leaf.nbytes for leaves in parts.values() for leaf in leaves.values())
        saving = self._path(step, _SAVING)
        try:
            processes.from_first("saving", lambda: self._make(saving))
        except CheckpointError as error:
            response = error
        else:
            response = self._begin(saving, state_tree.without_empty(parts), needed)
        self._pending = self._executor.submit(self._commit, saving, response, content, needed, wait)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when the last save is on the disk; CheckpointError if it failed."""
        failure = self._join()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """`wait`, then take no more saves."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def _join(self) -> CheckpointError | None:
        """Wait for the save under way; its failure, told once."""
        pending, self._pending = self._pending, None
        return pending.result() if pending else None

    def _commit(self, saving, response, content, needed: int, quiet: bool):
        """Runs in the background: finish, check and name a save; its failure is returned."""

        def write() -> None:
            if isinstance(response, Exception):
                raise response
            processes.wait_for(f"save_{self._saves}", response.result)

        def name() -> None:
            if jax.process_index() == 0:
                manifest.write(saving, content)
                self._rename(saving, content["step"])
                self._damaged.discard(content["step"])

        def describe(error: Exception) -> CheckpointError:
            if jax.process_count() == 1:
                storage.remove(saving)  # before the free bytes are counted
            return storage.save_failure(error, self.directory, content["step"], needed)

        for part in (write, name):  # nobody goes on, or returns, before all are done
            failure = processes.attempt("saved", part, describe)
            if failure is not None:
                if jax.process_index() == 0:
                    storage.remove(saving)
                    if not quiet:
                        self._warn(f"{failure}; the run goes on")
                return failure
        if jax.process_index() == 0:
            try:
                for step in retention.outdated(
                    self.directory, self.steps(), content["step"], self._config, self._damaged
                ):
                    deleted = self._path(step, _DELETED)
                    os.replace(self._path(step), deleted)
                    storage.remove(deleted)
            except (OSError, CheckpointError) as error:
                self._warn(f"old checkpoints in {self.directory} could not be deleted: {error}")
        return None

    def _begin(self, saving: Path, parts: state_tree.Parts, needed: int):
        """Copy the arrays, to be written in the background; the wait for that, or its failure."""
        self._saves += 1
        try:
            return storage.orbax().save_checkpointables_async(saving / manifest.ARRAYS, parts)
        except Exception as error:
            if jax.process_count() == 1:
                return error
            failure = storage.save_failure(error, self.directory, int(saving.stem), needed)
            raise ProcessError(f"{failure}; the other processes wait for it") from error

    def _make(self, saving: Path) -> None:
        """The directory of a save, without those of earlier ones that failed."""
        self._remove_leftovers()
        try:
            saving.mkdir()
        except OSError as error:
            raise CheckpointError(str(error)) from error

    def _rename(self, saving: Path, step: int) -> None:
        """Give a finished save its name, in place of an earlier one of the same step."""
        final = self._path(step)
        if final.exists():
            os.replace(final, self._path(step, _DELETED))
        os.replace(saving, final)
        storage.sync(self.directory)
        storage.remove(self._path(step, _DELETED))

    def _finish_renames(self) -> None:
        """Name the saves that were complete when a former process was stopped."""
        for step, suffix in self._listing():
            saving = self._path(step, _SAVING)
            if (
                suffix == _SAVING
                and step not in self.steps()
                and (saving / manifest.FILE_NAME).exists()
            ):
                try:
                    manifest.read(saving)
                except manifest.Damaged:
                    continue
                self._rename(saving, step)

    def _remove_leftovers(self) -> None:
        """Delete what stopped processes left half-written or half-deleted."""
        for step, suffix in self._listing():
            if suffix:
                storage.remove(self._path(step, suffix))


def open_for_reading(
    workdir: str | Path, *, warn: Callable[[str], None] = logging.warning
) -> CheckpointReader:
    """The checkpoints of a run that exists; CheckpointError when there is none."""
    path = storage.local_path(workdir)
    if not path.is_dir():
        raise CheckpointError(f"no work directory {path}; give the --workdir of a training run")
    reader = CheckpointReader(path, warn=warn)
    if not reader._listing():
        raise CheckpointError(f"no checkpoint in {reader.directory}; train the run first")
    return reader
