"""Reading and writing folders: exact round trips, and one clear line for each kind of damage."""

import dataclasses
import hashlib
import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from interop_cases import CASES, FIXTURES, MODELS, random_arrays

from efficient_lm.config import ModelConfig, layer
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.interop import family, hugging_face, layout, qwen3, rope, shards


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder."""
    result = {}
    for path in directory.glob("*.safetensors"):
        result |= safetensors.numpy.load_file(path)
    return result


def same_bytes(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether names, shapes, dtypes and bytes agree."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes()
        for n in a
    )


@pytest.fixture
def copy(tmp_path):
    """A function that copies a fixture to a folder which may be damaged."""

    def make(name: str, **fields) -> Path:
        target = tmp_path / name
        shutil.copytree(MODELS / name, target)
        edit(target, **fields)
        return target

    return make


def edit(directory: Path, **fields) -> None:
    """Change fields of config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({n: v for n, v in config.items() if v is not None}))


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact(name, tmp_path):
    model, arrays = hugging_face.read_model(MODELS / name)
    original = hugging_face.read_config(MODELS / name)
    hugging_face.write_model(tmp_path, model, arrays, original, shard_bytes=100_000)
    assert same_bytes(tensors_of(tmp_path), tensors_of(MODELS / name))
    assert hugging_face.read_config(tmp_path) == original
    index = json.loads((tmp_path / shards.INDEX_FILE).read_text())
    files = set(index["weight_map"].values())
    assert files == {path.name for path in tmp_path.glob("*.safetensors")} and len(files) > 1
    again = hugging_face.read_model(tmp_path)
    assert again[0] == model
    assert jax.tree.all(jax.tree.map(np.array_equal, again[1], arrays))


# Dense Qwen3-Next is the same function as Qwen3.5, and written as that.
@pytest.mark.parametrize("name", [name for name in CASES if name != "qwen3_next"])
def test_config_written_without_an_original_describes_the_same_model(name, tmp_path):
    model, arrays = hugging_face.read_model(MODELS / name)
    written = hugging_face.write_model(tmp_path, model, arrays)
    original = hugging_face.read_config(MODELS / name)
    ignored = family.IGNORED_FIELDS - {"architectures", "model_type", "dtype"}
    for fields in (written, original):
        for field in ignored:
            fields.pop(field, None)
    rope_fields = set(family.ROPE_FIELDS)
    partial = hugging_face.family_of(original).partial_rope
    assert rope.read(written, partial=partial) == rope.read(original, partial=partial)
    if not original.get("use_sliding_window"):
        rope_fields.add("max_window_layers")
    same = {n: v for n, v in original.items() if n not in rope_fields}
    assert {n: v for n, v in written.items() if n not in rope_fields} == same
    assert same_bytes(tensors_of(tmp_path), tensors_of(MODELS / name))


@pytest.mark.parametrize("name", CASES)
def test_the_recorded_check_in_transformers_is_of_these_files(name):
    """What `make_hf_reference.py --check` reloaded equals these fixtures byte for byte."""
    record = json.loads((FIXTURES / "export_check.json").read_text())
    sha = hashlib.sha256()
    for path in sorted((MODELS / name).iterdir()):
        sha.update(path.name.encode() + path.read_bytes())
    for kind in ("", "-derived"):
        case = record["cases"][name + kind]
        assert case["sha256_of_fixture"] == sha.hexdigest()
        assert case["largest_error_over_largest_logit"] < 2e-4


def test_one_tensor_is_in_memory_beside_the_model(tmp_path):
    model = ModelConfig(vocabulary_size=4096, embed_dim=256, num_layers=8)
    arrays = random_arrays(model)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    largest = 4096 * 256 * 4
    hugging_face.write_model(tmp_path, model, arrays)
    tracemalloc.start()
    try:
        _, again = hugging_face.read_model(tmp_path)
        read_peak = tracemalloc.get_traced_memory()[1]
        held = tracemalloc.get_traced_memory()[0]
        (tmp_path / "again").mkdir()
        tracemalloc.reset_peak()
        hugging_face.write_model(tmp_path / "again", model, again)
        write_peak = tracemalloc.get_traced_memory()[1] - held
    finally:
        tracemalloc.stop()
    assert read_peak < size + 2.2 * largest
    assert write_peak < 1.2 * largest + 4e6
    assert jax.tree.all(jax.tree.map(np.array_equal, again, arrays))


def test_a_tied_model_may_store_its_head_as_well(copy):
    directory = copy("qwen3")
    tensors = tensors_of(directory)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors, directory / shards.SINGLE_FILE)
    assert "head" not in hugging_face.read_model(directory)[1]
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + ml_dtypes.bfloat16(1)
    safetensors.numpy.save_file(tensors, directory / shards.SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs .* set it to false"):
        hugging_face.read_model(directory)


def test_defaults_of_older_configs(copy):
    directory = copy(
        "llama3", architectures=None, head_dim=None, attention_bias=None, mlp_bias=None,
        tie_word_embeddings=None, dtype=None, rope_parameters=None, torch_dtype="float32",
        rope_theta=10_000.0,
        rope_scaling={
            "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )  # fmt: skip
    model, _ = hugging_face.read_model(directory)
    assert model == hugging_face.read_model(MODELS / "llama3")[0]


FIELD_ERRORS = {
    "type": ({"hidden_size": "48"}, "config.model.embed_dim='48' is of type str; it must be int"),
    "architecture": (
        {"architectures": ["MistralForCausalLM"]},
        r"'MistralForCausalLM' is not supported; supported: LlamaForCausalLM, Qwen3ForCausalLM",
    ),
    "rope": (
        {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
        r"rope_parameters of type 'longrope' is not supported; supported: default, llama3, yarn",
    ),
    "rope field": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}},
        r"fields that are not supported: mscale",
    ),
    "partial rope": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        r"partial_rotary_factor=0.5 is not supported",
    ),
    "activation": ({"hidden_act": "gelu"}, r"hidden_act='gelu' .* supported: 'silu'"),
    "bias": ({"mlp_bias": True}, r"mlp_bias=True is not supported"),
    "quantised": (
        {"quantization_config": {"quant_method": "fp8"}},
        r"quantization_config=.*fp8.* is not supported",
    ),
    "missing": ({"hidden_size": None, "head_dim": None}, r"config.json lacks .*hidden_size"),
}


@pytest.mark.parametrize("name", FIELD_ERRORS)
def test_config_that_we_cannot_compute(name, copy):
    fields, message = FIELD_ERRORS[name]
    with pytest.raises(ConfigError, match=message):
        hugging_face.read_model(copy("llama3", **fields))


def test_window_layers_must_match_the_layers(copy):
    given = hugging_face.read_config(MODELS / "qwen3_window")
    with pytest.raises(ConfigError, match=r"layer_types has 1 entries .* num_hidden_layers=3"):
        hugging_face.read_model(copy("qwen3_window", layer_types=["full_attention"]))
    with pytest.raises(ConfigError, match=r"layer_types has 0 entries .* num_hidden_layers=3"):
        qwen3.FAMILY.read(given | {"layer_types": [], "use_sliding_window": False})
    with pytest.raises(ConfigError, match=r"sliding_window=0; it must be at least 1"):
        qwen3.FAMILY.read(given | {"sliding_window": 0})
    with pytest.raises(ConfigError, match=r"max_window_layers='2'; it must be a whole number"):
        qwen3.FAMILY.read(given | {"max_window_layers": "2", "layer_types": None})
    with pytest.raises(ConfigError, match=r"use_sliding_window='false'; it must be true or false"):
        qwen3.FAMILY.read(given | {"use_sliding_window": "false"})


def test_missing_files(copy, tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        hugging_face.read_model(tmp_path / "nothing")
    directory = copy("llama3")
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 3 files .*model-00002-of-00003"):
        hugging_face.read_model(directory)
    (directory / shards.INDEX_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model.safetensors nor"):
        hugging_face.read_model(directory)


@pytest.mark.parametrize("keep", [0, 5, 40, 0.5, -1])
def test_truncated_file(keep, copy):
    directory = copy("llama3_tied")
    path = directory / shards.SINGLE_FILE
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated"):
        hugging_face.read_model(directory)


def test_damaged_json(copy):
    directory = copy("llama3")
    (directory / shards.INDEX_FILE).write_text("[]")
    with pytest.raises(CheckpointError, match=r"is no index of safetensors"):
        hugging_face.read_model(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is no JSON"):
        hugging_face.read_model(directory)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": 3}, "has architectures=3; it must be a list"),
        ({"layer_types": 4}, "has layer_types=4; it must be a list"),
        ({"rope_parameters": "default"}, "has rope_parameters='default'; it must be an object"),
        ({"rope_parameters": {"rope_theta": "1e7"}}, "rope_theta='1e7'; it must be a number"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, r"of type \['yarn'\] is not supported"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta=0.0; it must be above 0"),
        ({"rope_parameters": {"rope_theta": False}}, "rope_theta=False; it must be a number"),
        ({"rope_parameters": {}, "rope_theta": []}, r"rope_theta=\[\]; it must be a number"),
        ({"layer_types": []}, r"layer_types has 0 entries of \[\]; it must have num_hidden_layers"),
        ({"layer_types": [1, []]}, r"layer_types has 2 entries of \['1', '\[\]'\]; it must have"),
        ({"head_dim": 0}, "head_dim=0; it must be a whole number of at least 1"),
        ({"text_config": {"layer_types": 4}}, "has layer_types=4; it must be a list"),
    ],
)
def test_fields_of_another_kind_are_said_in_one_line(fields, message, copy):
    directory = copy("qwen3_5")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises((CheckpointError, ConfigError), match=message) as error:
        hugging_face.read_model(directory)
    assert "\n" not in str(error.value)


def test_tensors_that_do_not_fit_are_listed(copy):
    directory = copy("llama3_tied")
    tensors = tensors_of(directory)
    tensors["model.norms.weight"] = tensors.pop("model.norm.weight")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].copy()
    other = "model.layers.0.mlp.up_proj.weight"
    tensors[other] = tensors[other].view(np.int16)
    safetensors.numpy.save_file(tensors, directory / shards.SINGLE_FILE)
    with pytest.raises(CheckpointError) as caught:
        hugging_face.read_model(directory)
    for part in (
        "1 missing: model.norm.weight",
        "1 unexpected: model.norms.weight",
        f"1 of another shape: {name} [95, 64] instead of [96, 64]",
        f"1 of a dtype other than F32, BF16, F16: {other} I16",
    ):
        assert part in str(caught.value)


def test_layers_of_different_dtypes_are_refused(copy):
    directory = copy("llama3_tied")
    tensors = tensors_of(directory)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float32)
    safetensors.numpy.save_file(tensors, directory / shards.SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"ffn/up is stored as BF16, F32"):
        hugging_face.read_model(directory)


def test_models_of_ours_choose_the_architecture_that_fits(tmp_path):
    plain = ModelConfig(embed_dim=32, num_layers=5, layers=(layer(), layer(window=8)))
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot express .*window=8"):
        hugging_face.write_model(tmp_path, plain, {})
    normed = dataclasses.replace(plain, mixers={"attention": {"qk_norm": True}})
    arrays = random_arrays(normed)
    written = hugging_face.write_model(tmp_path, normed, arrays)
    assert written["architectures"] == ["Qwen3ForCausalLM"]
    assert written["layer_types"][:2] == ["full_attention", "sliding_attention"]
    model, again = hugging_face.read_model(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, arrays))
    assert len(model.layers) == 2
    # Layers 0 to 3 are two periods of two places, layer 4 is the rest.
    stack, stored = arrays["stack"], tensors_of(tmp_path)
    for number, block, index in (
        (1, stack["period"]["1"], 0),
        (2, stack["period"]["0"], 1),
        (4, stack["rest"]["0"], ...),
    ):
        np.testing.assert_array_equal(
            stored[f"model.layers.{number}.mlp.up_proj.weight"], block["ffn"]["up"][index].T
        )


def test_null_means_what_it_means_to_transformers():
    given = hugging_face.read_config(MODELS / "qwen3_window")
    assert family_windows(given) == {24}
    assert family_windows(given | {"layer_types": None}) == {24}
    assert family_windows(given | {"layer_types": None, "max_window_layers": 3}) == set()
    assert family_windows(given | {"sliding_window": None}) == set()
    assert family_windows(given | {"use_sliding_window": False}) == set()
    wide = qwen3.FAMILY.read(given | {"head_dim": None})
    assert wide.mixers["attention"]["head_dim"] == 16


def family_windows(given: dict) -> set[int]:
    """The windows of the layers of a Qwen3 config."""
    layers = qwen3.FAMILY.read(given).layers
    return {options["window"] for _, options, _, _ in layers if "window" in options}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_placement": "sandwich"}, "config.model.norm_placement='sandwich'"),
        ({"embedding_scale": 2.0}, "config.model.embedding_scale=2.0"),
        ({"mixers": {"attention": {"gate": "sigmoid"}}}, "gate='sigmoid'"),
        ({"mixers": {"attention": {"rope": {"fraction": 0.5}}}}, "'fraction': 0.5"),
        ({"ffns": {"dense": {"activation": "gelu"}}}, "activation='gelu'"),
        ({"layers": (layer(ffn="none"),)}, "'none'"),
        ({"layers": (layer(), layer(ffn="none"))}, "layer 1: 'none'"),
    ],
)
def test_models_that_no_architecture_expresses(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        hugging_face.write_model(tmp_path, ModelConfig(**changes), {})


def test_layout_is_its_own_inverse(rng):
    sizes = {"heads": 3, "head_dim": 4, "embed": 5}
    one = [layout.Layout("embed (heads head_dim)", ("heads", "head_dim", "embed"), sizes)]
    stored = rng.normal(size=layout.stored_shape(one))
    assert stored.shape == (5, 12)
    (ours,) = layout.split(stored, one)
    assert ours.shape == (3, 4, 5) and ours[1, 2, 3] == stored[3, 1 * 4 + 2]
    np.testing.assert_array_equal(layout.join([ours], one), stored)


@pytest.mark.parametrize(
    ("text", "heads", "row"),
    [  # the row in which feature h of head n of part p lies; a part has `heads[p]` heads of 4
        ("(heads head_dim)+ 1 width", (2, 6), lambda p, n, h: (p * 2 + n) * 4 + h),
        ("(heads head_dim)+heads 1 width", (3, 3), lambda p, n, h: (n * 2 + p) * 4 + h),
        # two groups: two heads of the first part, then three of the second
        ("(heads head_dim)+groups 1 width", (4, 6),
         lambda p, n, h: (n // (2 + p) * 5 + p * 2 + n % (2 + p)) * 4 + h),
    ],
)  # fmt: skip
def test_joined_arrays_lie_where_the_layout_says(text, heads, row, rng):
    sizes = {"head_dim": 4, "width": 5, "groups": 2}
    axes = ("head_dim", "heads", "width")
    layouts = [layout.Layout(text, axes, sizes | {"heads": count}) for count in heads]
    stored = rng.normal(size=layout.stored_shape(layouts))
    assert stored.shape == (4 * sum(heads), 1, 5)
    parts = list(layout.split(stored, layouts))
    for p, count in enumerate(heads):
        assert parts[p].shape == (4, count, 5)
        for n in range(count):
            for h in range(4):
                np.testing.assert_array_equal(parts[p][h, n], stored[row(p, n, h), 0])
    np.testing.assert_array_equal(layout.join(parts, layouts), stored)
