"""Tokens per second, MFU and memory of a run."""

import time
from typing import Any

import jax
import numpy as np

from efficient_lm.training.flops import data_sheet_flops, training_flops_per_token
from efficient_lm.training.setup import Run
from pallas_kernels._core.timing import matmul_flops


class Speed:
    """Time of the training steps alone; evaluation and saving stop the clock.

    mfu is against the data sheet of the device, or against the measured rate of a large matrix
    product where no data sheet is known (CPUs); mfu_measured is always against the latter.
    """

    def __init__(self, run: Run):
        config = run.config
        self.tokens = config.data.batch_size * config.data.sequence_length
        per_token = training_flops_per_token(run.definition, config.data.sequence_length)
        self.flops = per_token * self.tokens
        device = run.mesh.local_devices[0]
        self.measured_roof = matmul_flops(config.model.dtype) * run.mesh.size
        sheet = data_sheet_flops(device)
        self.sheet_roof = None if sheet is None else sheet * run.mesh.size
        self.first = self.last_step = run.start
        self.seconds = 0.0
        self.restart()

    def restart(self) -> None:
        """Count from now: what came since the last measurement was no training."""
        self.since = time.perf_counter()

    def measure(self, step: int, completed: float) -> dict[str, float]:
        """Rates over the steps since the last measurement; `step` was done at time `completed`."""
        steps, seconds = step - self.last_step, completed - self.since
        self.last_step, self.since = step, completed
        self.seconds += seconds
        return self._rates(seconds / steps)

    def summary(self) -> dict[str, Any]:
        """Rates over the whole run, and the roofs that MFU refers to."""
        steps = self.last_step - self.first
        rates = self._rates(self.seconds / steps) if steps else {}
        return rates | {
            "run_seconds": self.seconds,
            "flops_per_step": self.flops,
            "measured_roof_flops": self.measured_roof,
            "data_sheet_roof_flops": self.sheet_roof,
            "mfu_roof": "data sheet" if self.sheet_roof else "measured matrix product",
        }

    def _rates(self, seconds: float) -> dict[str, float]:
        rate = self.flops / seconds
        return {
            "step_seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "mfu": rate / (self.sheet_roof or self.measured_roof),
            "mfu_measured": rate / self.measured_roof,
        }


def peak_memory_bytes(compiled) -> int:
    """Most bytes alive on one device in a step, by the compiler's analysis of the program."""
    analysis = compiled.memory_analysis()
    total = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    return int(np.asarray(total))


def device_memory_bytes(device: jax.Device) -> int | None:
    """Most bytes that were in use on the device, where its runtime counts them."""
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use")
