"""The worked examples of CONTRIBUTING.md run, and have the properties that are asked of methods."""

import importlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import registry
from efficient_lm.config import Config, ModelConfig, ObjectiveConfig
from efficient_lm.errors import ConfigError
from efficient_lm.model.definition import define, initialize
from pallas_kernels._core.testing import errors_against
from tests.mixers import cases
from tests.mixers import test_registry_suite as suite
from tests.parallel import test_equality as meshes

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
FILES = dict(
    re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```$", CONTRIBUTING.read_text(), re.M | re.S)
)
PACKAGES = ("efficient_lm.mixers", "efficient_lm.objectives", "pallas_kernels")


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The files of the page, importable under their names and registered as it says."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in PACKAGES:
        package = importlib.import_module(name)
        extra = str(tmp_path / name.replace(".", "/"))
        monkeypatch.setattr(package, "__path__", [*package.__path__, extra])
    _, mixer, target = re.search(r'(`)"(\w+)": "(efficient_lm\.mixers\.[\w:.]+)"`',
                                 CONTRIBUTING.read_text()).groups()  # fmt: skip
    monkeypatch.setitem(registry.MIXERS, mixer, target)
    monkeypatch.setitem(cases.CASES, mixer, {"two_heads": {"num_heads": 2}})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.replace(".", "/") in str(FILES) or name.startswith("pallas_kernels.rms_norm"):
            del sys.modules[name]


def test_every_example_is_new_and_short():
    assert len(FILES) == 6
    root = CONTRIBUTING.parent
    assert [name for name in FILES if (root / name).exists()] == []
    assert all(len(text.splitlines()) < 100 for text in FILES.values())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp_tensor_data", "fsdp_ulysses", "tensor_upipe"])
def test_the_mixer_runs_on_meshes(examples, mesh, monkeypatch):
    monkeypatch.setitem(meshes.CASES, "decay", {"eight_heads": {"num_heads": 16}})
    config = meshes.make_config("decay", "eight_heads", meshes.MESHES[mesh])
    rows = config.data.batch_size
    alone = meshes.make_config("decay", "eight_heads", {"data": 1} if rows == 8 else {})
    meshes.assert_same(meshes.loss_and_gradients(config, 8), meshes.loss_and_gradients(alone, 1))


def test_a_mixer_without_a_ring_says_so(examples, monkeypatch):
    monkeypatch.setitem(meshes.CASES, "decay", {"eight_heads": {"num_heads": 8}})
    config = meshes.make_config("decay", "eight_heads", {"ring": 8})
    with pytest.raises(ConfigError, match="'decay' does not go along a ring"):
        meshes.loss_and_gradients(config, 8)


@pytest.mark.slow
def test_the_mixer_passes_the_suite(examples, rng):
    tokens = suite.BATCH * suite.LENGTH
    tokens = jnp.asarray(rng.permutation(tokens).reshape(suite.BATCH, -1), jnp.int32)
    case = ("decay", "two_heads")
    suite.test_a_changed_token_changes_nothing_before_it(*case, tokens)
    suite.test_prefill_and_single_steps_equal_the_parallel_form(*case, tokens)
    suite.test_packed_documents_equal_separate_sequences(*case, tokens)
    suite.test_padding_around_documents_changes_nothing(*case, tokens)
    suite.test_padding_anywhere_changes_nothing_with_a_state(*case, tokens, rng)


def test_the_mixer_is_chosen_by_a_config(examples):
    config = Config.from_dict({"model": {"layers": ("decay",)}})
    assert config.to_dict()["model"]["mixers"] == {"decay": {"num_heads": 4}}
    with pytest.raises(ValueError, match="num_heads=3 does not divide 128"):
        Config.from_dict({"model": {"layers": ("decay",), "mixers": {"decay": {"num_heads": 3}}}})


@pytest.mark.parametrize("implementation", ["auto", "xla", "ref"])
def test_the_op_agrees_with_its_reference(examples, rng, implementation):
    op = importlib.import_module("pallas_kernels.rms_norm")
    ref = importlib.import_module("pallas_kernels.rms_norm.ref")
    x, scale = rng.standard_normal((5, 7)), rng.standard_normal(7)
    arguments = {"x": jnp.asarray(x, jnp.float32), "scale": jnp.asarray(scale, jnp.float32)}
    errors = errors_against(
        lambda x, scale: ref.rms_norm(x, scale, epsilon=1e-6),
        lambda x, scale: op.rms_norm(x, scale, implementation=implementation),
        arguments,
        jnp.ones((5, 7)),
    )
    assert set(errors) == {"out", "d_x", "d_scale"} and max(errors.values()) < 1e-6
    root_mean_square = np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
    np.testing.assert_allclose(op.rms_norm(**arguments), x / root_mean_square * scale, rtol=1e-4)
    assert op.explain(**arguments).name == "xla"


def test_the_objective_scores_the_second_half(examples):
    module = importlib.import_module("efficient_lm.objectives.second_half")
    config = ModelConfig(vocabulary_size=11, embed_dim=8, num_layers=1)
    definition = define(config)
    model = definition.bind(initialize(definition, jax.random.key(0)))
    tokens = jnp.arange(16, dtype=jnp.int32).reshape(2, 8) % 11
    batch = {"tokens": tokens, "labels": jnp.roll(tokens, -1, axis=1),
             "weights": jnp.ones(tokens.shape)}  # fmt: skip
    loss, metrics = module.second_half(ObjectiveConfig())(model, batch, None)
    log_probabilities = jax.nn.log_softmax(model(tokens).logits)
    picked = jnp.take_along_axis(log_probabilities, batch["labels"][..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(loss, -picked[:, 4:].mean(), rtol=1e-5)
    assert float(metrics["weight_sum"]) == 8.0
