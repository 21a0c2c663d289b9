"""Two learning rates and three seeds of ten steps of a tiny model, to see that sweeps run.

Command: python -m efficient_lm.sweep --sweep=configs/sweeps/debug.py --workdir=runs/sweep
Device: any; 2 CPU cores are enough.
Expected time: not measured here.
Expected metric: not measured here.
"""

from efficient_lm.sweeping import Sweep, over, product


def get_sweep():
    """The six runs."""
    return Sweep(
        config="configs/debug.py",
        runs=product(
            over("optimizer.learning_rate", [3e-3, 1e-2]),
            over("training.seed", range(3)),
        ),
    )
