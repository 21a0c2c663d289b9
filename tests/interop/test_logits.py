"""Checkpoints written by transformers give its logits here (fixtures/make_hf_reference.py)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop_cases import CASES, FIXTURES, MODELS

from efficient_lm.interop import hugging_face, rope
from efficient_lm.model.definition import define, unstack
from efficient_lm.model.rope import frequencies

ROPE = json.loads((FIXTURES / "rope.json").read_text())


def load(name):
    """(fp32 model, arrays, tokens, logits of transformers)."""
    model, arrays = hugging_face.read_model(MODELS / name)
    arrays = jax.tree.map(jnp.asarray, arrays)
    reference = np.load(MODELS / f"{name}.npz")
    model = dataclasses.replace(model, dtype="float32")
    return model, arrays, jnp.asarray(reference["tokens"]), reference["logits"]


def limit(name) -> float:
    """Largest error allowed in fp32; the contract is 2e-4.

    Half of the tokens have below 2e-6, but norms of outputs that nearly cancel magnify it.
    """
    return 1e-4 if name.startswith(("qwen3_5", "qwen3_next")) else 2e-5


def error(logits, reference) -> float:
    """Largest error over the largest logit."""
    return float(np.abs(np.asarray(logits) - reference).max() / np.abs(reference).max())


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name):
    model, arrays, tokens, reference = load(name)
    logits = jax.jit(lambda a, t: define(model).bind(a)(t).logits)(arrays, tokens)
    assert error(logits, reference) < limit(name)


def _without(model, name):
    """The model with RoPE scaling or windows taken away."""
    attention = dict(model.mixers["attention"])
    if name == "windows":
        return dataclasses.replace(model, layers=model.layers[:1] * len(model.layers))
    attention["rope"] = {**attention["rope"], "scaling": "none", "factor": 1.0}
    return dataclasses.replace(model, mixers={"attention": attention})


@pytest.mark.parametrize(
    ("name", "part"), [("llama3", "rope"), ("qwen3_window", "rope"), ("qwen3_window", "windows")]
)
def test_inputs_are_long_enough_to_tell(name, part):
    model, arrays, tokens, reference = load(name)
    changed = _without(model, part)
    logits = jax.jit(lambda a, t: define(changed).bind(a)(t).logits)(arrays, tokens)
    assert error(logits, reference) > 1e-2


@pytest.mark.parametrize("name", ["llama3", "qwen3_window", "qwen3_5"])
def test_decoding_with_a_cache_gives_the_same_logits(name):
    model, arrays, tokens, reference = load(name)
    prompt = 60  # longer than the window, and some steps follow
    bound = define(model, scan=False).bind(unstack(arrays))
    state = bound.init_state(1, tokens.shape[1], jnp.float32)
    output = jax.jit(lambda t, s: bound(t, state=s, fresh=True))(tokens[:, :prompt], state)
    assert error(output.logits, reference[:, :prompt]) < limit(name)
    step = jax.jit(lambda t, s: bound(t, state=s))
    for position in range(prompt, tokens.shape[1]):
        output = step(tokens[:, position : position + 1], output.state)
        assert error(output.logits, reference[:, position : position + 1]) < limit(name)


def test_bfloat16_checkpoints_compute_in_bfloat16():
    model, arrays = hugging_face.read_model(MODELS / "qwen3")
    reference = np.load(MODELS / "qwen3.npz")
    assert model.dtype == "bfloat16"
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(arrays)} == {"bfloat16"}
    run = jax.jit(lambda a, t: define(model).bind(a)(t))
    output = run(arrays, jnp.asarray(reference["tokens"]))
    assert output.hidden.dtype == jnp.bfloat16
    assert 1e-5 < error(output.logits, reference["logits"]) < 5e-2


@pytest.mark.parametrize("name", ROPE)
def test_frequencies_are_those_of_transformers(name):
    case = ROPE[name]
    config = rope.read(case["config"])
    inverse, scale = frequencies(config, case["config"]["head_dim"])
    # theirs is computed in fp32 throughout
    np.testing.assert_allclose(inverse, case["inverse_frequencies"], rtol=5e-7)
    np.testing.assert_allclose(scale, case["attention_factor"], rtol=1e-12)


@pytest.mark.parametrize("name", ROPE)
def test_rope_fields_survive_a_round_trip(name):
    config = rope.read(ROPE[name]["config"])
    assert rope.read(rope.write(config)) == config


def test_older_rope_fields_mean_the_same():
    given = ROPE["llama3_8b"]["config"]["rope_parameters"]
    scaling = {name: value for name, value in given.items() if name != "rope_theta"}
    older = {"rope_theta": given["rope_theta"], "rope_scaling": scaling}
    kind = scaling.pop("rope_type")
    for name in ("rope_type", "type"):
        scaling[name] = kind
        assert rope.read(older) == rope.read({"rope_parameters": given})
        del scaling[name]
