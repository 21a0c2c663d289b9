"""Learning-rate schedules: exact at their joints, continuous, a function of the step alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import ScheduleConfig
from efficient_lm.training.schedules import make_schedule

PEAK, STEPS = 2e-3, 1000
SHAPES = [
    {"name": "constant"},
    {"name": "cosine"},
    {"name": "linear"},
    {"name": "wsd", "decay_shape": "linear"},
    {"name": "wsd", "decay_shape": "cosine"},
    {"name": "wsd", "decay_shape": "one_minus_sqrt"},
]


def rates(config, steps=STEPS):
    return np.asarray(jax.vmap(make_schedule(config, PEAK, steps))(jnp.arange(steps + 1)))


@pytest.mark.parametrize("fields", SHAPES, ids=lambda fields: "-".join(fields.values()))
def test_joints_are_exact_and_the_rest_continuous(fields):
    config = ScheduleConfig(**fields, warmup_steps=100, decay_fraction=0.2, final_fraction=0.1)
    values = rates(config)
    peak = np.float32(PEAK)
    np.testing.assert_allclose(values[0], PEAK / 101, rtol=1e-6)  # the first update moves
    assert values[100] == peak
    np.testing.assert_allclose(values[:101], PEAK * np.arange(1, 102) / 101, rtol=1e-6)
    end = PEAK if config.name == "constant" else 0.1 * PEAK
    np.testing.assert_allclose(values[-1], end, rtol=1e-6)
    if config.name == "wsd":
        assert np.all(values[100:801] == peak)
        assert values[801] < peak
    if config.name != "constant":
        assert np.all(np.diff(values[100:]) <= 0)
    # 1 - sqrt falls by sqrt(1 / 200) of its range in its first step; the others are gentler.
    assert np.max(np.abs(np.diff(values))) <= 0.0637 * PEAK


@pytest.mark.parametrize(
    ("fields", "middle"),
    [
        ({"name": "cosine"}, 0.1 + 0.9 * 0.5),
        ({"name": "linear"}, 0.1 + 0.9 * 0.5),
        ({"name": "wsd", "decay_shape": "one_minus_sqrt"}, 1.0),
    ],
)
def test_half_way(fields, middle):
    config = ScheduleConfig(**fields, warmup_steps=100)
    np.testing.assert_allclose(rates(config)[550], middle * PEAK, rtol=1e-5)


def test_quarter_of_a_one_minus_sqrt_decay():
    config = ScheduleConfig(name="wsd", decay_shape="one_minus_sqrt", final_fraction=0.0)
    np.testing.assert_allclose(rates(config)[850], 0.5 * PEAK, rtol=1e-6)


def test_wsd_branches_share_everything_before_their_decay():
    config = ScheduleConfig(name="wsd", warmup_steps=50)
    long, short = rates(config, 1000), rates(config, 500)
    np.testing.assert_array_equal(long[:401], short[:401])


@pytest.mark.parametrize("fields", SHAPES, ids=lambda fields: "-".join(fields.values()))
@pytest.mark.parametrize("steps", [1, 10, 100, 110])
def test_runs_shorter_than_their_warmup_stay_finite_and_continuous(fields, steps):
    values = rates(ScheduleConfig(**fields, warmup_steps=100), steps)
    assert np.all(np.isfinite(values)) and np.all(values > 0) and np.all(values <= PEAK)


def test_no_warmup_starts_at_the_peak():
    assert rates(ScheduleConfig(name="cosine", warmup_steps=0))[0] == np.float32(PEAK)


def test_beyond_the_end_the_final_rate_stays():
    schedule = make_schedule(ScheduleConfig(name="linear", warmup_steps=10), PEAK, 100)
    assert schedule(100) == schedule(10**6)


def test_int_array_and_jit_agree():
    schedule = make_schedule(ScheduleConfig(name="cosine"), PEAK, STEPS)
    np.testing.assert_allclose(schedule(777), jax.jit(schedule)(jnp.int32(777)), rtol=1e-6)
