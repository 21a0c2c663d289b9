"""Muon and AdamW against a plain reference, clipping, decay, averages, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from efficient_lm.config import OptimizerConfig, ScheduleConfig
from efficient_lm.training.optimizer import (
    learning_rate,
    make_optimizer,
    parameter_groups,
    update_ema,
)

CONSTANT = ScheduleConfig(name="constant", warmup_steps=0)


def parameter(shape, axes, inputs=(), outputs=(), seed=0):
    value = np.random.default_rng(seed).normal(size=shape)
    return nnx.Param(jnp.asarray(value, jnp.float32), axes=axes, inputs=inputs, outputs=outputs)


def small_parameters():
    """Two stacked layers of attention-like and dense matrices, an embedding and a norm."""
    heads, embed = ("heads", "head_dim"), ("embed",)
    return {
        "embedding": parameter((11, 8), ("vocabulary", "embed"), seed=1),
        "layers": {
            "query": parameter((2, 8, 3, 4), ("layers", "embed", *heads), embed, heads, seed=2),
            "output": parameter((2, 3, 4, 8), ("layers", *heads, "embed"), heads, embed, seed=3),
            "up": parameter((2, 8, 20), ("layers", "embed", "mlp"), embed, ("mlp",), seed=4),
            "norm": parameter((2, 8), ("layers", "embed"), seed=5),
        },
    }


def arrays(parameters):
    return jax.tree.map(
        lambda p: p[...], parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def single_matrix(shape, name="muon", **fields):
    """(optimizer, array) of one hidden matrix, constant learning rate 1, nothing else."""
    config = OptimizerConfig(
        **{"name": name, "learning_rate": 1.0, "schedule": CONSTANT, "weight_decay": 0.0,
           "clip_norm": None} | fields
    )  # fmt: skip
    parameters = {"w": parameter(shape, ("embed", "mlp"), ("embed",), ("mlp",))}
    return make_optimizer(config, parameters, 10), arrays(parameters)


def one_update(optimizer, values, gradient):
    """The first update, compiled."""

    def update(values, gradient):
        return optimizer.update(gradient, optimizer.init(values), values)[0]

    return jax.jit(update)(values, gradient)


def first_update(shape, gradient, **fields):
    optimizer, values = single_matrix(shape, **fields)
    return one_update(optimizer, values, {"w": gradient})["w"]


# The reference.


def newton_schulz(x, steps=5):
    rows, columns = x.shape
    x = x / (np.linalg.norm(x) + 1e-12)
    x = x.T if rows > columns else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if rows > columns else x


MATRICES = {  # path -> (rows, columns) of each layer's matrix
    "layers/query": (8, 12),
    "layers/output": (12, 8),
    "layers/up": (8, 20),
}


def reference(config, parameters, gradients):
    """All parameters after one update for each dict of gradients, in float64 NumPy."""
    parameters = {path: p.astype(np.float64) for path, p in parameters.items()}
    first = {path: np.zeros_like(p) for path, p in parameters.items()}
    second = {path: np.zeros_like(p) for path, p in parameters.items()}
    for t, gradient in enumerate(gradients, start=1):
        norm = np.sqrt(sum(np.sum(np.square(g.astype(np.float64))) for g in gradient.values()))
        for path, p in parameters.items():
            g = gradient[path] * min(1.0, config.clip_norm / norm)
            if config.name == "muon" and path in MATRICES:
                mu = config.muon_momentum
                first[path] = mu * first[path] + (1 - mu) * g
                n = mu * first[path] / (1 - mu ** (t + 1)) + (1 - mu) * g / (1 - mu**t)
                rows, columns = MATRICES[path]
                scale = np.sqrt(max(1, columns / rows))
                if config.muon_scaling == "rms_match":
                    scale = 0.2 * np.sqrt(max(rows, columns))
                o = np.stack([newton_schulz(m.reshape(rows, columns)) for m in n])
                update = scale * o.reshape(p.shape)
                rate = config.muon_learning_rate or config.learning_rate
            else:
                first[path] = config.b1 * first[path] + (1 - config.b1) * g
                second[path] = config.b2 * second[path] + (1 - config.b2) * g**2
                m, v = first[path] / (1 - config.b1**t), second[path] / (1 - config.b2**t)
                update, rate = m / (np.sqrt(v) + config.epsilon), config.learning_rate
            decay = config.weight_decay if path in MATRICES else 0.0
            parameters[path] = p - rate * (update + decay * p)
    return parameters


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "adamw"},
        {"name": "muon", "muon_scaling": "rms_match"},
        {"name": "muon", "muon_scaling": "width_transfer", "muon_learning_rate": 0.02},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_twenty_updates_equal_the_reference(rng, fields):
    config = OptimizerConfig(
        learning_rate=3e-3, schedule=CONSTANT, weight_decay=0.1, clip_norm=15.0, **fields
    )
    parameters = small_parameters()
    optimizer = make_optimizer(config, parameters, 100)
    values = arrays(parameters)
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(values)
    ]

    def by_name(tree):
        return dict(zip(names, map(np.asarray, jax.tree.leaves(tree)), strict=True))

    start, state, gradients = by_name(values), optimizer.init(values), []

    @jax.jit
    def step(values, state, gradient):
        updates, state = optimizer.update(gradient, state, values)
        return optax.apply_updates(values, updates), state

    for _ in range(20):  # norms on both sides of the clip
        scale = rng.uniform(0.2, 2.0)
        gradient = jax.tree.map(
            lambda x, scale=scale: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32),
            values,
        )
        gradients.append(by_name(gradient))
        values, state = step(values, state, gradient)
    norms = [np.sqrt(sum(np.sum(g**2) for g in d.values())) for d in gradients]
    assert min(norms) < 15 < max(norms)
    expected = reference(config, start, gradients)
    for path, value in by_name(values).items():
        assert not np.allclose(value, start[path])
        np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256)])
def test_muon_orthogonalises(rng, shape):
    gradient = jnp.asarray(rng.normal(size=shape), jnp.float32)
    update = first_update(shape, gradient)
    rms = float(jnp.sqrt(jnp.mean(jnp.square(update))))
    assert 0.18 <= rms <= 0.20
    singular = np.linalg.svd(update, compute_uv=False) / (0.2 * np.sqrt(1024))
    assert singular.min() > 0.66 and singular.max() < 1.15
    u, _, vt = np.linalg.svd(-gradient, full_matrices=False)
    error = np.linalg.norm(update / (0.2 * np.sqrt(1024)) - u @ vt) / np.linalg.norm(u @ vt)
    assert error < 0.2
    width = first_update(shape, gradient, muon_scaling="width_transfer")
    factor = np.sqrt(max(1, shape[1] / shape[0])) / (0.2 * np.sqrt(1024))
    np.testing.assert_allclose(width, factor * update, rtol=1e-4, atol=1e-6)


def test_muon_knows_no_gradient_scale(rng):
    gradient = jnp.asarray(rng.normal(size=(16, 24)), jnp.float32)
    update = first_update((16, 24), gradient)
    for scale in (1e3, 1e-6, 1e-9):
        np.testing.assert_allclose(
            first_update((16, 24), scale * gradient), update, rtol=1e-3, atol=2e-5
        )
    np.testing.assert_array_equal(first_update((16, 24), 0.0 * gradient), 0.0)


def test_muon_of_a_transposed_matrix_is_transposed(rng):
    gradient = jnp.asarray(rng.normal(size=(16, 24)), jnp.float32)
    np.testing.assert_allclose(
        first_update((24, 16), gradient.T), first_update((16, 24), gradient).T, atol=1e-5
    )


def test_stacked_layers_are_optimized_one_by_one(rng):
    axes = ("embed", "mlp")
    config = OptimizerConfig(name="muon", schedule=CONSTANT, clip_norm=None)
    stacked = {"w": parameter((4, 8, 12), ("layers", *axes), axes[:1], axes[1:])}
    separate = {
        str(layer): nnx.Param(
            stacked["w"][...][layer], axes=axes, inputs=axes[:1], outputs=axes[1:]
        )
        for layer in range(4)
    }
    gradient = jnp.asarray(rng.normal(size=(4, 8, 12)), jnp.float32)
    together = make_optimizer(config, stacked, 10)
    updates = one_update(together, arrays(stacked), {"w": gradient})
    alone = make_optimizer(config, separate, 10)
    by_layer = {str(layer): gradient[layer] for layer in range(4)}
    expected = one_update(alone, arrays(separate), by_layer)
    for layer in range(4):
        np.testing.assert_allclose(updates["w"][layer], expected[str(layer)], atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_hidden_matrices_decay(name):
    config = OptimizerConfig(name=name, learning_rate=0.5, schedule=CONSTANT, weight_decay=0.1)
    parameters = small_parameters()
    values = arrays(parameters)
    optimizer = make_optimizer(config, parameters, 10)
    updates = one_update(optimizer, values, jax.tree.map(jnp.zeros_like, values))
    np.testing.assert_array_equal(updates["embedding"], 0.0)
    np.testing.assert_array_equal(updates["layers"]["norm"], 0.0)
    for path in ("query", "output", "up"):
        np.testing.assert_allclose(
            updates["layers"][path], -0.05 * values["layers"][path], rtol=1e-6
        )


def test_the_schedule_drives_both_groups():
    schedule = ScheduleConfig(name="linear", warmup_steps=4, final_fraction=0.0)
    config = OptimizerConfig(
        name="muon", learning_rate=1.0, muon_learning_rate=10.0, schedule=schedule,
        weight_decay=1.0,
    )  # fmt: skip
    parameters = small_parameters()
    values = arrays(parameters)
    optimizer = make_optimizer(config, parameters, 12)
    state, zeros = optimizer.init(values), jax.tree.map(jnp.zeros_like, values)
    rate, update = learning_rate(config, 12), jax.jit(optimizer.update)
    for step in range(12):
        updates, state = update(zeros, state, values)
        ratio = updates["layers"]["up"] / values["layers"]["up"]
        np.testing.assert_allclose(ratio, -10.0 * float(rate(step)), rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_nested_dicts_and_nnx_state_give_the_same(rng, name):
    class Model(nnx.Module):
        def __init__(self):
            self.embedding = small_parameters()["embedding"]
            self.blocks = nnx.List([nnx.Dict(small_parameters()["layers"])])

    state = nnx.state(Model(), nnx.Param)
    values = nnx.to_pure_dict(state)
    config = OptimizerConfig(name=name)
    assert "blocks/0/up" in parameter_groups(config, state)
    optimizer = make_optimizer(config, state, 10)
    gradient = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), values)
    from_dict = one_update(optimizer, values, gradient)
    as_state = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(gradient))
    from_state = one_update(optimizer, state, as_state)
    jax.tree.map(np.testing.assert_array_equal, from_dict, nnx.to_pure_dict(from_state))


@pytest.mark.parametrize("axis", ["embed", "mlp", "layers"])
def test_sharded_update_equals_one_device(rng, axis):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
    axes = ("layers", "embed", "mlp")
    parameters = {"w": parameter((4, 16, 24), axes, ("embed",), ("mlp",))}
    config = OptimizerConfig(name="muon", learning_rate=1.0, schedule=CONSTANT)
    optimizer = make_optimizer(config, parameters, 10)
    values = arrays(parameters)
    gradient = {"w": jnp.asarray(rng.normal(size=(4, 16, 24)), jnp.float32)}

    def two_updates(values, gradient):
        state = optimizer.init(values)
        for _ in range(2):
            updates, state = optimizer.update(gradient, state, values)
            values = optax.apply_updates(values, updates)
        return values

    sharding = NamedSharding(mesh, P(*("x" if name == axis else None for name in axes)))
    place = {"w": sharding}
    placed = jax.device_put(values, place), jax.device_put(gradient, place)
    compiled = jax.jit(two_updates, out_shardings=place).lower(*placed).compile()
    if axis == "layers":  # each device orthogonalises its own matrices
        assert "all-gather" not in compiled.as_text()
    sharded = compiled(*placed)
    assert sharded["w"].sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_allclose(sharded["w"], jax.jit(two_updates)(values, gradient)["w"], atol=1e-5)


def test_average_starts_at_the_weights_and_follows_them():
    start = {"w": jnp.zeros((3,)), "b": jnp.ones((), jnp.bfloat16)}
    target = {"w": jnp.full((3,), 2.0), "b": jnp.ones((), jnp.bfloat16)}
    first = update_ema(start, target, 0.999, 0)
    np.testing.assert_allclose(first["w"], 0.9 * 2.0, rtol=1e-6)  # decay (1 + 0) / (10 + 0)
    late = jax.jit(update_ema, static_argnums=2)(start, target, 0.999, jnp.int32(10**6))
    np.testing.assert_allclose(late["w"], 0.001 * 2.0, rtol=1e-4)
    assert first["b"].dtype == jnp.bfloat16
    average = start
    for step in range(200):
        average = update_ema(average, target, 0.9, step)
    np.testing.assert_allclose(average["w"], 2.0, rtol=1e-6)
