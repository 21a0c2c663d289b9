"""Which learning rate suits the quickstart: a coarse grid, then draws around its best.

Command: python -m efficient_lm.sweep --sweep=configs/sweeps/learning_rate.py --workdir=runs/rates
Device: 2 CPU cores.
Expected time: 10 minutes, one run at a time, on 2 cores that had much other work.
Expected metric: valid bits_per_byte 2.72 at 8e-3, 2.81 at 4e-3 and 1.6e-2, within 0.02.
"""

from efficient_lm.sweeping import Sweep, chain, log_uniform, over, product, sample

# Comparing rates needs fewer steps than the best model does; the schedule shrinks with them.
SHORT = over("training.steps", [200])


def get_sweep():
    """Five rates a factor of 2 apart, and four draws of the rate and the weight decay."""
    return Sweep(
        config="configs/quickstart.py",
        runs=product(
            SHORT,
            chain(
                over("optimizer.learning_rate", [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]),
                sample(
                    4,
                    {
                        "optimizer.learning_rate": log_uniform(2e-3, 8e-3),
                        "optimizer.weight_decay": log_uniform(1e-2, 1.0),
                    },
                ),
            ),
        ),
        metric="bits_per_byte",
    )
