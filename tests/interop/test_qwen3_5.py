"""Qwen3.5: every parameter has its meaning, documents stay apart, whole checkpoints are read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from interop_cases import MODELS, random_arrays

import efficient_lm
from efficient_lm.config import ModelConfig, layer
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.inference.engine import Generator
from efficient_lm.interop import conversion, hugging_face, qwen3_5
from efficient_lm.model.definition import define

SINGLE_FILE = "model.safetensors"
HYBRID = ModelConfig(
    vocabulary_size=40,
    embed_dim=32,
    num_layers=4,
    norm="zero_centered_rms_norm",
    layers=("gated_deltanet",) * 3 + (layer("attention", gate="sigmoid", qk_norm=True),),
    mixers={"gated_deltanet": {"num_value_heads": 4, "num_key_heads": 2}},
)


@pytest.fixture(scope="module")
def loaded():
    """(model(arrays, tokens, segments, positions) -> logits, arrays, tokens, reference logits)."""
    model, arrays = hugging_face.read_model(MODELS / "qwen3_5_untied")
    definition = define(dataclasses.replace(model, dtype="float32"))
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
    reference = np.load(MODELS / "qwen3_5_untied.npz")

    @jax.jit
    def run(arrays, tokens, segments, positions):
        bound = definition.bind(arrays)
        return bound(tokens, segment_ids=segments, positions=positions).logits

    return run, arrays, reference["tokens"], reference["logits"]


def error(logits, reference) -> float:
    """Largest error over the largest logit."""
    return float(np.abs(np.asarray(logits) - reference).max() / np.abs(reference).max())


def alone(run, arrays, tokens):
    """Logits where each row is one document."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32)[None], tokens.shape)
    return run(arrays, tokens, np.ones_like(tokens), positions)


def test_the_fixture_tells_each_parameter(loaded):
    """No parameter is so small or so uniform that a mistake in it could hide."""
    run, arrays, tokens, reference = loaded
    assert error(alone(run, arrays, tokens), reference) < 2e-5
    leaves, structure = jax.tree.flatten(arrays)
    for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(arrays)):
        changed = structure.unflatten([*leaves[:index], leaf[..., ::-1], *leaves[index + 1 :]])
        assert error(alone(run, changed, tokens), reference) > 5e-3, path


def test_packed_documents_are_those_of_separate_rows(loaded):
    run, arrays, tokens, reference = loaded
    lengths = (13, 40, 15)  # and padding of 4
    packed, segments, positions = np.zeros((3, *tokens.shape), np.int32)
    start = 0
    for number, length in enumerate(lengths):
        row = slice(start, start + length)
        packed[0, row], segments[0, row] = tokens[0, :length], number + 1
        positions[0, row] = np.arange(length)
        start += length
    logits = np.split(np.asarray(run(arrays, packed, segments, positions)), np.cumsum(lengths), 1)
    for part, length in zip(logits, lengths, strict=False):
        assert error(part, reference[:, :length]) < 2e-5


def test_generation_from_a_converted_model_is_greedy_in_the_parallel_form(tmp_path):
    conversion.to_workdir(MODELS / "qwen3_5", tmp_path / "run")
    model, tokenizer, _ = efficient_lm.load(tmp_path / "run", dtype="float32")
    prompt = np.load(MODELS / "qwen3_5.npz")["tokens"][0, :60]
    generator = Generator(model, tokenizer, [prompt], max_new_tokens=12, temperature=0)
    (made,) = generator.run().tokens
    logits = model(jnp.asarray(np.concatenate([prompt, made])[None])).logits[0]
    assert made.tolist() == np.argmax(logits[59:-1], axis=-1).tolist()
    assert len(made) == 12 and len(set(made.tolist())) > 3


@pytest.fixture
def whole(tmp_path):
    """The fixture as its text model stands in a published checkpoint; names as transformers has."""
    source = tmp_path / "whole"
    source.mkdir()
    tensors = safetensors.numpy.load_file(MODELS / "qwen3_5" / SINGLE_FILE)
    tensors = {
        name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()
    }
    other = np.ones((2, 3), ml_dtypes.bfloat16)
    for name in ("model.visual.blocks.0.attn.qkv.weight", "mtp.fc.weight"):
        tensors[name] = other
    safetensors.numpy.save_file(tensors, source / SINGLE_FILE)
    text = json.loads((MODELS / "qwen3_5/config.json").read_text())
    tied = text.pop("tie_word_embeddings")
    for name in ("architectures", "transformers_version"):
        del text[name]
    text |= {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1}
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5",
        "text_config": text, "vision_config": {"depth": 1}, "tie_word_embeddings": tied,
        "transformers_version": "5.23.0",
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    return source


def test_the_text_model_of_a_whole_checkpoint_is_read(whole, tmp_path):
    lines = conversion.to_workdir(whole, tmp_path / "run")
    assert "left out 2 tensors beside the text model, such as model.visual" in "\n".join(lines)
    assert "fields of config.json that have no meaning here: mtp_num_hidden_layers" in lines
    conversion.from_workdir(tmp_path / "run", tmp_path / "out")
    given = (MODELS / "qwen3_5" / SINGLE_FILE).read_bytes()
    assert (tmp_path / "out" / SINGLE_FILE).read_bytes() == given
    written = json.loads((tmp_path / "out/config.json").read_text())
    expected = json.loads((MODELS / "qwen3_5/config.json").read_text())
    assert {n: v for n, v in written.items() if n in expected} == expected


def test_a_quantised_whole_checkpoint_is_refused(whole):
    config = json.loads((whole / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (whole / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantization_config=.*fp8.* is not supported"):
        hugging_face.read_model(whole)


def test_a_missing_tensor_of_a_whole_checkpoint_is_named_as_there(whole):
    tensors = safetensors.numpy.load_file(whole / SINGLE_FILE)
    name = "model.language_model.layers.3.self_attn.q_proj.weight"
    del tensors[name]
    safetensors.numpy.save_file(tensors, whole / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=f"1 missing: {name}"):
        hugging_face.read_model(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_output_gate": False}, "attn_output_gate=False is not supported .*: True"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"layer_types": ["linear_attention", "sliding_attention"] * 2}, "layer_types has 4 .*"),
        ({"layer_types": None, "full_attention_interval": 0}, "full_attention_interval=0; it must"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0; it must be a whole number of at least 1"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers='4'; it must be a whole number"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim=0; it must be"),
        ({"architectures": ["Qwen3_5MoeForCausalLM"]}, "'Qwen3_5MoeForCausalLM' is not supported"),
    ],
)
def test_configs_that_we_cannot_compute(changes, message):
    given = hugging_face.read_config(MODELS / "qwen3_5") | changes
    with pytest.raises(ConfigError, match=message):
        hugging_face.family_of(given).read(given)


def test_mixtures_of_experts_are_refused_in_one_line():
    given = hugging_face.read_config(MODELS / "qwen3_next") | {"num_experts": 512}
    with pytest.raises(ConfigError, match=r"num_experts=512 is not supported for Qwen3Next.*: 0"):
        hugging_face.family_of(given).read(given)
    del given["num_experts"]
    with pytest.raises(ConfigError, match="num_experts=512"):
        hugging_face.family_of(given).read(given)


def test_defaults_are_those_of_transformers():
    given = hugging_face.read_config(MODELS / "qwen3_5")
    small = {n: v for n, v in given.items() if not n.startswith(("linear_", "rope", "layer_"))}
    model = qwen3_5.FAMILY.read(small | {"num_hidden_layers": 8})
    assert [entry[0] for entry in model.layers] == ["gated_deltanet"] * 3 + ["attention"]
    assert model.mixers["gated_deltanet"] == {
        "num_value_heads": 32, "num_key_heads": 16, "key_dim": 128, "value_dim": 128,
        "convolution_width": 4,
    }  # fmt: skip
    assert model.mixers["attention"]["rope"]["fraction"] == 0.25
    odd = qwen3_5.FAMILY.read(small | {"num_hidden_layers": 8, "full_attention_interval": 3})
    assert [entry[0] for entry in odd.layers] == ["gated_deltanet"] * 2 + ["attention"]


def test_a_hybrid_of_ours_is_exported(tmp_path):
    arrays = random_arrays(HYBRID)
    written = hugging_face.write_model(tmp_path, HYBRID, arrays)
    assert written["architectures"] == ["Qwen3_5ForCausalLM"]
    assert written["linear_key_head_dim"] == 8
    _, again = hugging_face.read_model(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, arrays))
    block = arrays["stack"]["rest"]["3"]["mixer"]
    stored = safetensors.numpy.load_file(tmp_path / SINGLE_FILE)
    joined = stored["model.layers.3.self_attn.q_proj.weight"].reshape(4, 2, 8, 32)
    np.testing.assert_array_equal(joined[2, 0, 5], block["query"][:, 2, 5])
    np.testing.assert_array_equal(joined[2, 1, 5], block["gate"][:, 2, 5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "rms_norm"}, "Qwen3_5ForCausalLM cannot express config.model.norm='rms_norm'"),
        ({"layers": (layer("gated_deltanet", decay=False),)}, "decay=False"),
        ({"layers": (layer("gated_deltanet", negative_eigenvalues=True),)}, "negative_eigen"),
        ({"layers": (layer("attention", qk_norm=True),)}, "gate='none'"),
    ],
)
def test_hybrids_that_no_architecture_expresses(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        hugging_face.write_model(tmp_path, dataclasses.replace(HYBRID, **changes), {})


def test_parameters_that_are_stored_together_have_one_dtype(tmp_path):
    arrays = random_arrays(HYBRID)
    mixer = arrays["stack"]["rest"]["3"]["mixer"]
    mixer["gate"] = mixer["gate"].astype(np.float16)
    with pytest.raises(CheckpointError, match=r"q_proj.weight would join .*/query and .*/gate"):
        hugging_face.write_model(tmp_path, HYBRID, arrays)
