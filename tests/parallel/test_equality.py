"""Loss and gradients on eight devices are those of one, for every mixer, mesh and preset."""

import functools

import jax
import numpy as np
import pytest

from efficient_lm import registry
from efficient_lm.config import Config, layer
from efficient_lm.errors import ConfigError
from efficient_lm.model.definition import define, initialize
from efficient_lm.parallel.check import check_mesh
from efficient_lm.parallel.mesh import make_mesh
from efficient_lm.parallel.placement import place_batch
from efficient_lm.parallel.rules import PRESETS, parameter_shardings
from efficient_lm.training.step import make_loss
from tests.parallel.cases import CASES, EMBED_DIM, LENGTH

VOCABULARY = 48
FAST_COMPILE = {"xla_backend_optimization_level": 0}

# Fields of config.parallel; `rows` of the batch is 8 where a mesh splits rows, else 3.
MESHES = {
    "fsdp": {"fsdp": 8},
    "replicated": {"data": 8, "rules": "replicated"},
    "slices": {"dcn": 2, "data": 2, "fsdp": 2},
    "tensor": {"tensor": 8, "data": 1},
    "tensor_replicated": {"tensor": 4, "data": 2, "rules": "replicated"},
    "megatron": {"tensor": 4, "data": 2, "rules": "megatron"},
    "fsdp_tensor_data": {"fsdp": 2, "tensor": 2, "data": 2},
    "ulysses": {"sequence": 8},
    "fsdp_ulysses": {"fsdp": 2, "sequence": 4},
    "tensor_ulysses": {"tensor": 2, "sequence": 4},
    "megatron_ulysses": {"tensor": 2, "sequence": 4, "rules": "megatron"},
    "upipe": {"sequence": 8, "heads_at_once": 8},
    "fsdp_upipe": {"fsdp": 2, "sequence": 4, "heads_at_once": 4},
    "tensor_upipe": {"tensor": 2, "sequence": 4, "heads_at_once": 8},
    "data_upipe_local": {"data": 8, "heads_at_once": 4},
    "ring": {"ring": 8},
    "ring_ulysses": {"ring": 2, "sequence": 4},
    "fsdp_ring_upipe": {"fsdp": 2, "ring": 2, "sequence": 2, "heads_at_once": 2},
}
ALL = [
    (mixer, case, mesh)
    for mixer, cases in CASES.items()
    for case in cases
    for mesh, sizes in MESHES.items()
    if "ring" not in sizes or registry.mixer(mixer).has_ring
]


def make_config(mixer: str, case: str, parallel: dict, **model) -> Config:
    rows = 8 if {"data", "fsdp", "dcn"} & parallel.keys() else 3
    return Config.from_dict(
        {
            "model": {
                "vocabulary_size": VOCABULARY, "embed_dim": EMBED_DIM, "num_layers": 2,
                "max_length": LENGTH, "initializer": "fan_in", "tie_embeddings": False,
                # Norms of a head's output that is near zero would blow up differences of rounding.
                "norm_epsilon": 1e-2,
                "layers": (layer(mixer, **CASES[mixer][case]),),
            } | model,
            "data": {"sequence_length": LENGTH, "batch_size": rows},
            "parallel": {"data": 1} | parallel,
        }
    )  # fmt: skip


def make_batch(rows: int) -> dict[str, np.ndarray]:
    """Packed documents, one of which starts inside of most devices' tokens; padding at the end."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (rows, LENGTH + 1)).astype(np.int32)
    starts = rng.integers(1, LENGTH - 4, (rows, 2))
    segments = 1 + (np.arange(LENGTH)[None, :, None] >= starts[:, None]).sum(-1)
    segments[:, -3:] = 0
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "weights": ((rng.random((rows, LENGTH)) < 0.8) & (segments > 0)).astype(np.float32),
        "segment_ids": segments.astype(np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1)),
    }


def loss_and_gradients(config: Config, devices: int):
    """(loss, gradients) as host arrays."""
    mesh = make_mesh(config.parallel, jax.devices()[:devices])
    definition = define(config.model)
    check_mesh(config, definition, mesh)
    loss = make_loss(config, definition, mesh, np.ones(VOCABULARY, np.int32))
    shardings = parameter_shardings(mesh, definition.parameters, config.parallel.rules)
    arrays = jax.device_put(initialize(definition, jax.random.key(0)), shardings)
    gradient = jax.jit(
        jax.value_and_grad(lambda arrays, batch: loss(arrays, batch, None)[0]),
        compiler_options=FAST_COMPILE,
    )
    value, gradients = gradient(arrays, place_batch(make_batch(config.data.batch_size), mesh))
    return float(value), jax.device_get(gradients)


@functools.cache
def expected(mixer: str, case: str, rows: int):
    """The same on one device."""
    config = make_config(mixer, case, {"data": 1} if rows == 8 else {})
    assert config.data.batch_size == rows
    return loss_and_gradients(config, 1)


def assert_same(found, wanted):
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted[1]):
        other = found[1]
        for part in path:
            other = other[part.key]
        difference = np.linalg.norm(other - leaf) / max(np.linalg.norm(leaf), 1e-6)
        assert difference < 1e-5, (jax.tree_util.keystr(path), difference)


def test_every_registered_mixer_has_cases():
    assert set(CASES) == set(registry.MIXERS), "give each registered mixer cases in cases.py"


def test_every_preset_is_tried():
    assert {mesh.get("rules", "fsdp") for mesh in MESHES.values()} == set(PRESETS)


@pytest.mark.parametrize(("mixer", "case", "mesh"), ALL, ids=["-".join(c) for c in ALL])
def test_eight_devices_equal_one(mixer, case, mesh):
    config = make_config(mixer, case, MESHES[mesh])
    assert_same(loss_and_gradients(config, 8), expected(mixer, case, config.data.batch_size))


@pytest.mark.parametrize(
    ("mesh", "model"),
    [
        ("fsdp_ulysses", {"ffn_tokens_at_once": 4}),
        ("megatron_ulysses", {"ffn_tokens_at_once": 2}),
        ("fsdp_upipe", {"remat": "offload"}),
        ("ring_ulysses", {"remat": "full"}),
    ],
)
def test_what_saves_memory_changes_nothing(mesh, model):
    config = make_config("attention", "grouped_4", MESHES[mesh], **model)
    wanted = expected("attention", "grouped_4", config.data.batch_size)
    assert_same(loss_and_gradients(config, 8), wanted)


def test_pieces_that_do_not_divide_say_so():
    config = make_config("attention", "multi_head", {"sequence": 8}, ffn_tokens_at_once=3)
    with pytest.raises(ConfigError, match="ffn_tokens_at_once=3 does not divide the 4 tokens"):
        loss_and_gradients(config, 8)
