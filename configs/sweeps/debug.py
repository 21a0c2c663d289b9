"""Two learning rates and three seeds of ten steps of a tiny model, to see that sweeps run.

Command: python -m efficient_lm.sweep --sweep=configs/sweeps/debug.py --workdir=runs/sweep
Device: any; 2 CPU cores are enough.
Expected time: 100 seconds with --parallel=2, on 2 cores that had other work too.
Expected metric: valid loss 3.2 nats a byte at 1e-2 and 4.3 at 3e-3, within 0.1.
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
