"""A training run from its config to its last checkpoint: train, evaluate, save, stop, resume."""

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from efficient_lm import distributed, watch
from efficient_lm.config import Config
from efficient_lm.data.pipeline import make_evaluation_batches
from efficient_lm.data.prefetch import prefetch_to_device
from efficient_lm.errors import CheckpointError, NonFiniteError
from efficient_lm.parallel.placement import data_shard, place_batch
from efficient_lm.training import processes
from efficient_lm.training.metrics import MetricsWriter, read_metrics
from efficient_lm.training.progress import Progress
from efficient_lm.training.setup import Run, make_run_mesh, set_up, warn
from efficient_lm.training.speed import Speed, device_memory_bytes, peak_memory_bytes
from efficient_lm.training.state import TrainState
from efficient_lm.training.storage import locked

PROFILED_STEPS = 5


def train(config: Config, workdir: str | Path, *, profile: bool = False) -> dict[str, Any]:
    """Run `config` in `workdir`, going on from its newest good checkpoint if there is one.

    Writes checkpoints, metrics.jsonl, TensorBoard files and summary.json; returns the summary.
    `profile` writes a jax.profiler trace of a few steps to workdir/profile.

    Raises:
      UserError: config, data, devices or checkpoints do not fit; non-finite values persist.
      SystemExit: 128 + the number of the signal, after SIGTERM or SIGINT and once all is saved.
    """
    mesh = make_run_mesh(config)
    with distributed.attended(), locked(Path(workdir)):
        run = set_up(config, Path(workdir), mesh)
        with (
            run.checkpointer,
            MetricsWriter(run.workdir, resume_step=run.start or None, warn=warn) as writer,
        ):
            return _Loop(run, writer, profile).run_all()


class _Loop:
    """The host's side of a run: what was logged, evaluated and saved, and when."""

    def __init__(self, run: Run, writer: MetricsWriter, profile: bool):
        self.run, self.config, self.writer = run, run.config, writer
        self.profile = profile and jax.process_index() == 0
        self.state: TrainState = run.state
        self.batches = prefetch_to_device(
            run.iterator, lambda batch: place_batch(batch, run.mesh), run.config.data.prefetch
        )
        self.speed = Speed(run)
        self.fetcher = ThreadPoolExecutor(1)
        self.pending: tuple[int, Future] | None = None
        self.evaluation: tuple[int, dict[str, float]] | None = None
        self.evaluation_batches: dict[int | None, Any] = {}
        self.saved: int | None = run.start if run.start else None
        self.skipped = 0
        self.summary: dict[str, Any] = {}

    def run_all(self) -> dict[str, Any]:
        """Train to the end or a signal; the summary."""
        total, start = self.config.training.steps, self.run.start
        with Progress(total, start) as self.progress, _signals() as received:
            self._introduce()
            if start < total:
                self._make_up(start)
                first = next(self.batches)
                step = self._compile(first)
                self._train(step, first, received)
            last = max(total, start)
            known = processes.from_first("known", lambda: self._known(last))
            if start >= total and known:  # a finished run that is started again
                self.evaluation = (last, known)
            else:
                self._evaluate(last, None)
            self._save(last, wait=True)
        return self._summarize()

    def _make_up(self, start: int) -> None:
        """The evaluation that a signal, which does not wait for it, left out at `start`."""
        every = self.config.evaluation.every
        if not start or not every or start % every:
            return
        if processes.from_first("evaluated", lambda: self._known(start)):
            return
        self._evaluate(start, self.config.evaluation.batches)
        if start % self.config.checkpointing.every == 0:
            self.saved = None  # it was, without these metrics
            self._save(start, wait=False)

    def _known(self, step: int) -> dict[str, Any] | None:
        """The last line of metrics of an evaluation at `step`, if there is one."""
        rows = [row for row in read_metrics(self.run.workdir, "valid") if row["step"] == step]
        return rows[-1] if rows else None

    def _train(self, step, batch, received: list[int]) -> None:
        config, total = self.config, self.config.training.steps
        self.speed.restart()
        for done in range(self.run.start + 1, total + 1):
            if batch is None:
                batch = next(self.batches)
            self._trace(done)
            watch.begins(done)
            self.state, metrics = step(self.state, batch)
            batch = None
            if done % config.training.log_every == 0 or done == total:
                # A thread waits for the values, so that the device never waits for the host.
                self._log()
                self.pending = (done, self.fetcher.submit(_fetch, metrics))
            number = watch.stops(done, received)
            if number:
                self._save(done, wait=True)
                name = signal.Signals(number).name
                self.progress.message(
                    f"{name}: saved step {done}; the same command goes on from there"
                )
                raise SystemExit(128 + number)
            every = config.evaluation.every
            if every and done % every == 0 and done < total:
                self._evaluate(done, config.evaluation.batches)
            if done % config.checkpointing.every == 0 and done < total:
                self._save(done, wait=False)
        self._log()

    def _introduce(self) -> None:
        run, total = self.run, self.config.training.steps
        device = run.mesh.devices.flat[0]
        self.progress.message(
            f"{run.definition.count():,} parameters on {run.mesh.size} x {device.device_kind}"
        )
        if run.start >= total:
            self.progress.message(f"{run.workdir} is finished at step {run.start}")
        elif run.start:
            self.progress.message(f"resuming {run.workdir} from step {run.start} of {total}")

    def _compile(self, batch):
        """The train step, compiled ahead so that its time and memory are known apart."""
        began = time.perf_counter()
        compiled = self.run.train_step.lower(self.state, batch).compile()
        self.summary["compile_seconds"] = time.perf_counter() - began
        self.summary["peak_memory_bytes"] = peak_memory_bytes(compiled)
        return compiled

    def _trace(self, done: int) -> None:
        """Start and stop the profiler around a few steps after the first log line."""
        if not self.profile:
            return
        first = self.run.start + self.config.training.log_every + 1
        if done == min(first, self.config.training.steps):
            jax.block_until_ready(self.state.step)
            jax.profiler.start_trace(str(self.run.workdir / "profile"))
        elif done == first + PROFILED_STEPS or done == self.config.training.steps:
            jax.block_until_ready(self.state.step)
            jax.profiler.stop_trace()
            self.profile = False
            self.progress.message(f"profile of {PROFILED_STEPS} steps: {self.run.workdir}/profile")

    def _log(self) -> None:
        """Wait for the metrics of the pending interval, if any, and write them."""
        if self.pending is None:
            return
        (step, future), self.pending = self.pending, None
        metrics, completed = future.result()
        row = {
            "loss": _divide(metrics["loss_sum"], metrics["weight_sum"]),
            "bits_per_byte": _divide(metrics["loss_sum"] / math.log(2), metrics["bytes_sum"]),
            "learning_rate": metrics["learning_rate"],
            "gradient_norm": metrics["gradient_norm"],
            "skipped_updates": int(metrics["skipped"]),
        } | self.speed.measure(step, completed)
        self.writer.write(step, "train", row)
        self.progress.update(step, row)
        if metrics["skipped"] > self.skipped:
            self.skipped = int(metrics["skipped"])
            self.progress.message(
                f"step {step}: non-finite loss or gradient; {self.skipped} updates skipped so far"
            )
        limit = self.config.training.max_nonfinite_steps
        if metrics["skipped_in_a_row"] >= limit:
            self._save(step, wait=True)
            raise NonFiniteError(
                f"loss or gradient was not finite in {limit} steps in a row (seen at step {step}); "
                "parameters are as before them; lower config.optimizer.learning_rate or raise "
                "config.training.max_nonfinite_steps"
            )

    def _evaluate(self, step: int, limit: int | None) -> None:
        """Score the validation split (at most `limit` batches) with the averaged weights if any."""
        self._log()
        if limit not in self.evaluation_batches:
            config = self.config
            index, count = data_shard(self.run.mesh)
            self.evaluation_batches[limit] = make_evaluation_batches(
                config.data,
                self.run.tokenizer,
                batch_size=config.evaluation.batch_size,
                stride=config.evaluation.stride,
                limit=limit,
                process_index=index,
                process_count=count,
            )
        parameters = self.state.parameters if self.state.average is None else self.state.average
        totals = None
        for batch in self.evaluation_batches[limit]:
            sums = self.run.evaluation_step(parameters, place_batch(batch, self.run.mesh))
            totals = sums if totals is None else jax.tree.map(jax.numpy.add, totals, sums)
        totals, _ = _fetch(totals)
        row = {
            "loss": _divide(totals["loss_sum"], totals["weight_sum"]),
            "bits_per_byte": _divide(totals["loss_sum"] / math.log(2), totals["bytes_sum"]),
            "accuracy": _divide(totals["correct_sum"], totals["weight_sum"]),
            "tokens": totals["weight_sum"],
        }
        self.writer.write(step, "valid", row)
        self.evaluation = (step, row)
        self.progress.message(
            f"step {step}: validation loss {row['loss']:.4f} nats a token, "
            f"{row['bits_per_byte']:.4f} bits per byte"
        )
        self.speed.restart()

    def _save(self, step: int, *, wait: bool) -> None:
        """Save once a step; a failed save is reported and only fatal where nothing follows it."""
        if self.saved == step:
            return
        self._log()
        evaluated = self.evaluation is not None and self.evaluation[0] == step
        try:
            self.run.checkpointer.save(
                step,
                self.state.as_dict(),
                iterator=self.batches.get_state(),
                config=self.config.to_dict(),
                metrics=self.evaluation[1] if evaluated else None,
                wait=wait,
            )
            self.saved = step
        except CheckpointError as error:
            if wait:
                raise
            self.progress.message(f"warning: {error}")
        self.speed.restart()

    def _summarize(self) -> dict[str, Any]:
        """Write and return what the run came to."""
        device = self.run.mesh.local_devices[0]
        step, row = self.evaluation
        summary = {
            "step": step,
            "valid": row,
            "parameters": self.run.definition.count(),
            "device": device.device_kind,
            "devices": self.run.mesh.size,
            "device_memory_bytes": device_memory_bytes(device),
            "jax": jax.__version__,
            "command": sys.argv,
            "skipped_updates": self.skipped,
        }
        summary |= self.speed.summary() | self.summary
        if jax.process_index() == 0:
            (self.run.workdir / "summary.json").write_text(json.dumps(summary, indent=2))
        return summary


def _fetch(values: dict[str, jax.Array]) -> tuple[dict[str, float], float]:
    """(values as floats, the time at which they were there)."""
    jax.block_until_ready(values)
    completed = time.perf_counter()
    return {name: float(value) for name, value in jax.device_get(values).items()}, completed


def _divide(numerator: float, denominator: float) -> float:
    """A mean; NaN of nothing."""
    return numerator / denominator if denominator else math.nan


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list; a second one stops at once, as without this."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number, frame):
        received.append(number)
        for again, handler in before.items():
            signal.signal(again, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
