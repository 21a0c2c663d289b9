"""Strict mode: eight CPU devices, strict dtype promotion, no silent rank promotion."""

import os

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    """--accelerator: the tests that need one, on what JAX finds; without it all others, on CPUs."""
    parser.addoption(
        "--accelerator", action="store_true", help="run the tests that need a GPU or TPU, alone"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """-n auto: a process a core, as many as have 3 GB of memory each; an accelerator takes one."""
    if config.getoption("accelerator"):
        return 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count(), memory // (3 << 30)))


def pytest_configure(config):
    """Choose the platform before anything asks for devices."""
    if config.getoption("accelerator"):
        if jax.default_backend() == "cpu":
            raise pytest.UsageError("--accelerator: JAX finds no GPU or TPU here, only CPUs")
        return
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    # Tests compile far more than they compute: half of LLVM's work would be for nothing.
    flags = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
    # Up to JAX 0.10 there are plain emitters still, which compile three times faster.
    if jax.__version_info__ < (0, 11):
        os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {flags}"
        jax.devices()  # reads the flags; libtpu, which reads them later, would refuse that one
    os.environ["XLA_FLAGS"] = flags


def pytest_collection_modifyitems(config, items):
    """Leave out what is for the other platform."""
    if config.getoption("accelerator"):
        others = [item for item in items if not item.get_closest_marker("accelerator")]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.get_closest_marker("accelerator")]
        return
    reason = "needs a GPU or TPU: run pytest --accelerator where there is one"
    for item in items:
        if item.get_closest_marker("accelerator"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """What one file compiled serves no other, and would slow down every garbage collection."""
    yield
    jax.clear_caches()


@pytest.fixture
def key():
    """A PRNG key, the same in every run."""
    return jax.random.key(0)


@pytest.fixture
def rng():
    """A NumPy generator, the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def save_run():
    """save_run(directory, config, parts, steps=(1,)): a work directory as training leaves it.

    `parts` maps "parameters" (and "average") to a function of the parameter's shape.
    """
    import json

    from flax import nnx

    from efficient_lm.data.tokenizers import ByteTokenizer
    from efficient_lm.model.definition import define
    from efficient_lm.training.checkpoint import Checkpointer

    def save(directory, config, parts, steps=(1,)):
        is_leaf = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
        parameters = define(config.model).parameters
        ByteTokenizer().save(directory / "tokenizer")
        (directory / "config.json").write_text(json.dumps(config.to_dict()))
        with Checkpointer(directory, config.checkpointing) as checkpointer:
            for step in steps:
                state = {
                    name: jax.tree.map(
                        lambda leaf, draw=draw: np.asarray(draw(leaf.shape), np.float32),
                        parameters,
                        is_leaf=is_leaf,
                    )
                    for name, draw in parts.items()
                }
                checkpointer.save(
                    step, state, iterator={}, config=config.to_dict(), metrics={}, wait=True
                )

    return save


@pytest.fixture(scope="session")
def run_config():
    """The config of a tiny run on text."""
    from efficient_lm.config import Config

    return Config.from_dict(
        {
            "model": {"embed_dim": 16, "num_layers": 2, "max_length": 64,
                      "mixers": {"attention": {"num_heads": 2}}},
            "data": {"sequence_length": 32, "batch_size": 4},
        }
    )  # fmt: skip


@pytest.fixture(scope="session")
def workdir(tmp_path_factory, save_run, run_config):
    """A run of random weights; do not change it."""
    directory = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    save_run(directory, run_config, {"parameters": lambda shape: 0.3 * rng.standard_normal(shape)})
    return directory
