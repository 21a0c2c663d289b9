"""Learning rate and weight decay of Llama 3.2 1B, on a thirtieth of its steps.

Command: python -m efficient_lm.sweep --sweep=configs/sweeps/llama3.py --workdir=runs/llama3_rates
Device: 8 GPUs of 80 GB or a TPU v5p slice for each run; --launch=slurm or --launch=xpk.
Expected time: not measured here.
Expected metric: not measured here.
"""

from efficient_lm.sweeping import Sweep, over, product


def get_sweep():
    """Six runs; the schedule ends with the steps, so that rates are compared at their end."""
    return Sweep(
        config="configs/llama3.py:1b",
        runs=product(
            over("training.steps", [3000]),
            over("optimizer.schedule.warmup_steps", [300]),
            over("optimizer.learning_rate", [1e-4, 3e-4, 1e-3]),
            over("optimizer.weight_decay", [0.03, 0.1]),
        ),
    )
