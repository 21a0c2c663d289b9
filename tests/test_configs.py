"""Every config in configs/ with every argument: contract of its docstring, checks, abstract run."""

import dataclasses
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from efficient_lm.config import Config
from efficient_lm.data.tokenizers import make_tokenizer
from efficient_lm.errors import ConfigError, DataError
from efficient_lm.inference.speed import state_bytes
from efficient_lm.interop import llama3, qwen3, qwen3_5
from efficient_lm.model.definition import define

ROOT = Path(__file__).parents[1]
SECTIONS = ("Paper", "Command", "Device", "Expected time", "Expected metric")


def module_of(path: Path):
    """The config file as a module."""
    spec = importlib.util.spec_from_file_location(f"configs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = {path.name: module_of(path) for path in sorted((ROOT / "configs").glob("*.py"))}


def config_of(name: str) -> Config:
    """The Config of "file.py" or "file.py:argument"."""
    file, _, argument = name.partition(":")
    get_config = MODULES[file].get_config
    return Config.from_config_dict(get_config(argument) if argument else get_config())


NAMES = [
    name
    for file, module in MODULES.items()
    for name in (file, *(f"{file}:{a}" for a in getattr(module, "ARGUMENTS", ())))
]


@pytest.mark.parametrize("file", MODULES)
def test_docstring_says_how_to_run_it_and_what_to_expect(file):
    module = MODULES[file]
    found = dict(re.findall(r"^(\w[\w ]*): (\S.*)$", module.__doc__, re.MULTILINE))
    assert [name for name in SECTIONS if name not in found] == []
    paper = found["Paper"]
    assert paper.startswith(("https://", "none"))
    command = re.fullmatch(
        r"python -m efficient_lm\.train --config=configs/(\S+?\.py)(?::(\S+))? --workdir=runs/\S+",
        found["Command"],
    )
    assert command and command[1] == file
    assert command[2] is None or command[2] in module.ARGUMENTS
    for name in ("Expected time", "Expected metric"):
        assert found[name] == "not measured here." or re.search(r"\d", found[name])


@pytest.mark.parametrize("file", MODULES)
def test_arguments_are_listed_and_others_refused(file):
    module = MODULES[file]
    takes_argument = bool(inspect.signature(module.get_config).parameters)
    assert takes_argument == hasattr(module, "ARGUMENTS"), "list the arguments in ARGUMENTS"
    if takes_argument:
        assert all(argument in module.__doc__ for argument in module.ARGUMENTS)
        with pytest.raises(ConfigError, match=f"'nonsense'.*{', '.join(module.ARGUMENTS)}"):
            module.get_config("nonsense")


@pytest.mark.parametrize("name", NAMES)
def test_config_survives_json_and_runs_abstractly(name):
    config = config_of(name)
    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    definition = define(config.model)
    arrays = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        definition.parameters,
        is_leaf=lambda leaf: not isinstance(leaf, dict),
    )
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def run(arrays, tokens):
        output = definition.bind(arrays)(tokens)
        return output.logits, output.hidden

    logits, hidden = jax.eval_shape(run, arrays, tokens)
    assert logits.shape == (2, 16, config.model.vocabulary_size) and logits.dtype == jnp.float32
    assert hidden.dtype == jnp.dtype(config.model.dtype)


def decoder_parameters(vocabulary, width, layers, heads, shared, head_dim, hidden, tied, qk_norm):
    """Parameters of a Llama-like decoder by hand."""
    attention = width * head_dim * (2 * heads + 2 * shared) + 2 * head_dim * qk_norm
    layer = attention + 3 * width * hidden + 2 * width
    return vocabulary * width * (1 if tied else 2) + layers * layer + width


@pytest.mark.parametrize(
    ("name", "published", "by_hand"),
    [
        ("llama3.py:1b", 1_235_814_400, (128256, 2048, 16, 32, 8, 64, 8192, True, 0)),
        ("llama3.py:8b", 8_030_261_248, (128256, 4096, 32, 32, 8, 128, 14336, False, 0)),
        ("qwen3.py:0.6b", 596_049_920, (151936, 1024, 28, 16, 8, 128, 3072, True, 1)),
        ("qwen3.py:1.7b", 1_720_574_976, (151936, 2048, 28, 16, 8, 128, 6144, True, 1)),
        ("qwen3.py:4b", 4_022_468_096, (151936, 2560, 36, 32, 8, 128, 9728, True, 1)),
        ("qwen3.py:8b", 8_190_735_360, (151936, 4096, 36, 32, 8, 128, 12288, False, 1)),
    ],
)
def test_parameter_counts_are_the_published_ones(name, published, by_hand):
    assert define(config_of(name).model).count() == published == decoder_parameters(*by_hand)


@pytest.mark.parametrize(
    ("size", "published", "width", "layers", "hidden", "heads", "shared", "value_heads", "tied"),
    [
        ("0.8b", 0.75, 1024, 24, 3584, 8, 2, 16, True),
        ("2b", 1.88, 2048, 24, 6144, 8, 2, 16, True),
        ("4b", 4.21, 2560, 32, 9216, 16, 4, 32, True),
        ("9b", 8.95, 4096, 32, 12288, 16, 4, 32, False),
        ("27b", 26.9, 5120, 64, 17408, 24, 4, 48, False),
    ],
)
def test_parameter_counts_of_qwen3_5(
    size, published, width, layers, hidden, heads, shared, value_heads, tied
):
    model = config_of(f"qwen3_5.py:{size}").model
    count = define(model).count()
    assert abs(count / 1e9 - published) <= 0.5 * 10.0 ** -(1 if published > 10 else 2)
    attention = width * 256 * (3 * heads + 2 * shared) + 2 * 256
    channels, values = 128 * (2 * 16 + value_heads), 128 * value_heads
    gated_deltanet = width * (channels + 2 * values + 2 * value_heads) + 4 * channels
    gated_deltanet += 2 * value_heads + 128
    every = 3 * width * hidden + 2 * width
    mixers = layers // 4 * (3 * gated_deltanet + attention)
    assert count == 248_320 * width * (2 - tied) + layers * every + mixers + width


@pytest.mark.parametrize(
    ("size", "memory", "cache"),
    [("0.8b", 18, 12), ("2b", 18, 12), ("4b", 48, 32), ("9b", 48, 32), ("27b", 144, 64)],
)
def test_decode_states_of_qwen3_5_are_the_published_ones(size, memory, cache):
    """MiB of memories, which are fp32; KiB of keys and values for each token, in bf16."""
    model = config_of(f"qwen3_5.py:{size}").model
    assert model.dtype == "bfloat16"
    assert state_bytes(model, 64, "memory") == memory * 2**20
    assert sum(state_bytes(model, 64, name) for name in ("key", "value")) == 64 * cache * 2**10


@pytest.mark.parametrize("name", ["gpt2_124m.py:muon", "gpt2_124m.py:adamw"])
def test_gpt2_has_its_shapes(name):
    model = config_of(name).model
    matrices = 12 * (4 + 8) * 768**2
    assert define(model).count() == 50304 * 768 + matrices + (2 * 12 + 1) * 768
    assert model.vocabulary_size % 128 == 0 and 0 <= model.vocabulary_size - 50257 < 128


FAMILIES = {"llama3": llama3.FAMILY, "qwen3": qwen3.FAMILY, "qwen3_5": qwen3_5.FAMILY}


@pytest.mark.parametrize("name", [n for n in NAMES if n.partition(".py")[0] in FAMILIES])
def test_model_families_are_those_of_hugging_face(name):
    """The shapes can be exported, and come back as the same config."""
    family = FAMILIES[name.partition(".py")[0]]
    model = config_of(name).model
    again = family.read(family.write(model))
    assert define(again).count() == define(model).count()
    assert dataclasses.replace(again, dtype=model.dtype, remat=model.remat).norm_epsilon == (
        model.norm_epsilon
    )


@pytest.mark.parametrize("name", ["gpt2_124m.py", "llama3.py", "qwen3.py"])
def test_missing_data_is_told_by_its_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = config_of(name).data
    with pytest.raises(DataError, match=re.escape(data.tokenizer)):
        make_tokenizer(data)


def test_an_unknown_argument_is_one_line_at_the_door(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "efficient_lm.train", "--config=configs/llama3.py:70b",
         f"--workdir={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1:] == [
        "error: unknown config argument '70b'; allowed: 1b, 8b"
    ]
    assert "Traceback" not in done.stderr
