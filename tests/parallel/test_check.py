"""What does not fit a mesh is one line that says what would, before anything is compiled."""

import jax
import pytest

from efficient_lm.config import Config
from efficient_lm.errors import ConfigError
from efficient_lm.model.definition import define
from efficient_lm.parallel.check import check_mesh
from efficient_lm.parallel.mesh import make_mesh


def check(parallel, data=(), attention=(), mixer="attention"):
    config = Config.from_dict(
        {
            "model": {
                "embed_dim": 32, "max_length": 64, "num_layers": 2,
                "layers": (mixer,), "mixers": {"attention": {"num_heads": 8} | dict(attention)},
                "ffns": {"dense": {"hidden_dim": 60}},
            },
            "data": {"sequence_length": 32, "batch_size": 8} | dict(data),
            "parallel": {"data": 1} | parallel,
        }
    )  # fmt: skip
    size = 1
    for value in parallel.values():
        size *= value if isinstance(value, int) else 1
    size //= parallel.get("heads_at_once", 1)
    check_mesh(config, define(config.model), make_mesh(config.parallel, jax.devices()[:size]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (({"fsdp": 8}, {"batch_size": 12}), r"12 rows cannot be split over 8 devices"),
        (({"sequence": 8}, {"sequence_length": 30}), r"sequence_length=30 cannot be split into 8"),
        (({"ring": 4}, {"sequence_length": 20}), r"cannot be split into 8 pieces .*ring=4"),
        (({"sequence": 8}, {}, {"num_heads": 4}), r"mixer has 4 heads.*config.parallel.ring"),
        (({"sequence": 4}, {}, {}, "mamba2"), r"1 head, .*the devices to config.parallel.fsdp"),
        (({"sequence": 2, "tensor": 4}, {}, {"num_heads": 4}), r"4 heads.*tensor=4"),
        (({"sequence": 4, "heads_at_once": 6},), r"heads_at_once=6 .*allowed: 4, 8"),
        (({"tensor": 8},), r"60 hidden features, which config.parallel.tensor=8"),
    ],
)
def test_what_does_not_fit_says_what_would(given, message):
    with pytest.raises(ConfigError, match=message):
        check(*given)


@pytest.mark.parametrize(
    "parallel", [{"fsdp": 8}, {"sequence": 8}, {"ring": 8}, {"sequence": 4, "heads_at_once": 4}]
)
def test_what_fits_passes(parallel):
    check(parallel)


def test_a_reserved_axis_says_so():
    with pytest.raises(ConfigError, match="expert=2; the axis is reserved"):
        check({"expert": 2})
