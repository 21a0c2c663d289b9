"""What a run is set up with."""

import jax
import numpy as np

from efficient_lm.config import Config
from efficient_lm.data.batch import empty_batch
from efficient_lm.parallel.placement import place_batch
from efficient_lm.training.setup import make_run_mesh, set_up


def test_a_step_leaves_the_state_where_it_was(tmp_path):
    """Small parameters of a core too, which the compiler would leave split as it used them."""
    config = Config.from_dict(
        {
            "model": {
                "embed_dim": 16, "num_layers": 1, "max_length": 16,
                "layers": (("gated_deltanet", {}, "none"),),
            },
            "data": {"sequence_length": 16, "batch_size": 8, "valid_fraction": 0.01},
            "parallel": {"data": 4, "sequence": 2},
        }
    )  # fmt: skip
    run = set_up(config, tmp_path, make_run_mesh(config))
    placed = jax.tree.map(lambda x: x.sharding, run.state)
    batch = jax.tree.map(np.asarray, empty_batch(8, 16))
    compiled = run.train_step.lower(run.state, place_batch(batch, run.mesh)).compile()
    same = jax.tree.map(
        lambda x, a, b: a.is_equivalent_to(b, x.ndim),
        run.state, placed, compiled.output_shardings[0],
    )  # fmt: skip
    assert jax.tree.all(same)
