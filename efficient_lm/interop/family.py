"""What a model family of Hugging Face is to us: tensor names and layouts, and config fields."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from efficient_lm.config import ModelConfig, layer, layer_options
from efficient_lm.errors import ConfigError
from efficient_lm.ffn.dense import DenseOptions
from efficient_lm.interop import rope
from efficient_lm.mixers.attention import AttentionOptions

# Of decoders with pre-norm, RMSNorm, grouped-query attention and SwiGLU. Ours -> (theirs, layout);
# matrices are stored [out, in]. The families add to it.
MODEL_TENSORS = {
    "embedding": ("model.embed_tokens.weight", "vocabulary embed"),
    "final_norm.scale": ("model.norm.weight", "embed"),
    "head": ("lm_head.weight", "vocabulary embed"),
}
LAYER_TENSORS = {
    "mixer_residual.norm_in.scale": ("input_layernorm.weight", "embed"),
    "mixer.query": ("self_attn.q_proj.weight", "(heads head_dim) embed"),
    "mixer.key": ("self_attn.k_proj.weight", "(key_value_heads head_dim) embed"),
    "mixer.value": ("self_attn.v_proj.weight", "(key_value_heads head_dim) embed"),
    "mixer.out": ("self_attn.o_proj.weight", "embed (heads head_dim)"),
    "mixer.query_bias": ("self_attn.q_proj.bias", "(heads head_dim)"),
    "mixer.key_bias": ("self_attn.k_proj.bias", "(key_value_heads head_dim)"),
    "mixer.value_bias": ("self_attn.v_proj.bias", "(key_value_heads head_dim)"),
    "mixer.out_bias": ("self_attn.o_proj.bias", "embed"),
    "ffn_residual.norm_in.scale": ("post_attention_layernorm.weight", "embed"),
    "ffn.gate": ("mlp.gate_proj.weight", "ffn embed"),
    "ffn.up": ("mlp.up_proj.weight", "ffn embed"),
    "ffn.down": ("mlp.down_proj.weight", "embed ffn"),
}
MODEL_FIELDS = {
    "vocabulary_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "max_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
ATTENTION_FIELDS = {
    "num_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "bias": "attention_bias",
    "output_bias": "attention_bias",
}
DENSE_FIELDS = {"hidden_dim": "intermediate_size"}
ROPE_FIELDS = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
# Fields that say nothing about the function that the model computes.
IGNORED_FIELDS = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "initializer_range", "attention_dropout", "pretraining_tp", "bos_token_id", "eos_token_id",
    "pad_token_id", "_name_or_path",
}  # fmt: skip
# Our fields that a checkpoint does not fix: how the model is drawn, trained and computed.
OWN_FIELDS = ("layers", "mixers", "ffns", "dropout", "initializer", "initializer_scale", "dtype",
              "remat")  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One architecture.

    defaults: fields that config.json may leave out; None: worked out from others.
    only: fields with the values that we can compute.
    layer_tensors: as LAYER_TENSORS, names without the prefix `model.layers.N.`.
    qk_norm, sliding_window: whether its layers have, or may have, them.
    """

    architecture: str
    model_type: str
    defaults: Mapping[str, Any]
    only: Mapping[str, tuple] = field(default_factory=dict)
    layer_tensors: Mapping[str, tuple[str, str]] = field(default_factory=lambda: LAYER_TENSORS)
    qk_norm: bool = False
    sliding_window: bool = False

    def read(self, given: dict[str, Any]) -> ModelConfig:
        """The model that config.json describes; ConfigError names what we cannot compute."""
        values = {**self.defaults, **given}
        for name, allowed in ({"quantization_config": (None,)} | dict(self.only)).items():
            if values.get(name) is not None and values[name] not in allowed:
                raise ConfigError(
                    f"{name}={values[name]!r} is not supported for {self.architecture}; "
                    f"supported: {', '.join(map(repr, allowed))}"
                )
        if "num_attention_heads" in values and values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        if {"hidden_size", "num_attention_heads"} <= set(values) and not values.get("head_dim"):
            values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        fields = MODEL_FIELDS | ATTENTION_FIELDS | DENSE_FIELDS
        missing = sorted(name for name in set(fields.values()) if values.get(name) is None)
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}")
        attention = {ours: values[theirs] for ours, theirs in ATTENTION_FIELDS.items()}
        attention |= {"qk_norm": self.qk_norm, "rope": dataclasses.asdict(rope.read(values))}
        windows = self._windows(values)
        period = next(
            p
            for p in range(1, len(windows) + 1)
            if all(w == windows[i % p] for i, w in enumerate(windows))
        )
        return ModelConfig(
            **{ours: values[theirs] for ours, theirs in MODEL_FIELDS.items()},
            layers=tuple(layer(**({"window": w} if w else {})) for w in windows[:period]),
            mixers={"attention": attention},
            ffns={"dense": {ours: values[theirs] for ours, theirs in DENSE_FIELDS.items()}},
        )

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """config.json for a model; ConfigError names what the architecture cannot express."""
        layers = _expand(model)
        attention, dense = layers[0][1], layers[0][3]
        if not isinstance(attention, AttentionOptions) or not isinstance(dense, DenseOptions):
            raise ConfigError(
                f"{self.architecture} has attention and dense layers only; config.model.layers "
                f"has {layers[0][0]!r} and {layers[0][2]!r}"
            )
        values = {theirs: getattr(model, ours) for ours, theirs in MODEL_FIELDS.items()}
        values |= {theirs: getattr(attention, ours) for ours, theirs in ATTENTION_FIELDS.items()}
        values |= {theirs: getattr(dense, ours) for ours, theirs in DENSE_FIELDS.items()}
        values |= {"architectures": [self.architecture], "model_type": self.model_type}
        values |= {name: allowed[0] for name, allowed in self.only.items()}
        values |= rope.write(attention.rope)
        if self.sliding_window:
            windows = [getattr(options, "window", None) for _, options, _, _ in layers]
            sliding = [i for i, window in enumerate(windows) if window]
            values["use_sliding_window"] = bool(sliding)
            values["sliding_window"] = windows[sliding[0]] if sliding else None
            values["max_window_layers"] = sliding[0] if sliding else model.num_layers
            values["layer_types"] = [
                "sliding_attention" if window else "full_attention" for window in windows
            ]
        lost = differences(model, self.read(values))
        if lost:
            raise ConfigError(f"{self.architecture} cannot express {'; '.join(lost)}")
        return dict(sorted(values.items()))

    def unread(self, given: dict[str, Any]) -> list[str]:
        """Fields of config.json that nothing here reads."""
        known = {*MODEL_FIELDS.values(), *ATTENTION_FIELDS.values(), *DENSE_FIELDS.values()}
        known |= IGNORED_FIELDS | {*ROPE_FIELDS, *self.defaults, *self.only}
        return sorted(set(given) - known)

    def _windows(self, values: dict[str, Any]) -> list[int | None]:
        """The window of each layer, None = all tokens."""
        count, window = values["num_hidden_layers"], values.get("sliding_window")
        if not self.sliding_window or not values["use_sliding_window"] or not window:
            return [None] * count
        first = values["max_window_layers"]
        types = values.get("layer_types") or [
            "sliding_attention" if i >= first else "full_attention" for i in range(count)
        ]
        windows = {"sliding_attention": window, "full_attention": None}
        unknown = sorted(set(types) - set(windows))
        if unknown or len(types) != count:
            raise ConfigError(
                f"layer_types has {len(types)} entries of {sorted(set(types))}; it must have "
                f"num_hidden_layers={count} of {', '.join(windows)}"
            )
        return [windows[kind] for kind in types]


def differences(model: ModelConfig, other: ModelConfig) -> list[str]:
    """ "field=value" of `model` wherever the two compute different functions."""
    result = []
    for name in (f.name for f in dataclasses.fields(ModelConfig)):
        if name not in OWN_FIELDS and getattr(model, name) != getattr(other, name):
            result.append(f"config.model.{name}={getattr(model, name)!r}")
    for index, (ours, theirs) in enumerate(zip(_expand(model), _expand(other), strict=False)):
        for a, b in zip(ours, theirs, strict=True):
            if isinstance(a, str):
                if a != b:
                    result.append(f"layer {index}: {a!r}")
                continue
            given, allowed = _comparable(a), _comparable(b)
            result += [
                f"layer {index}: {name}={value!r}"
                for name, value in given.items()
                if name not in allowed or allowed[name] != value
            ]
    return result


def _expand(model: ModelConfig) -> list[tuple[str, Any, str, Any]]:
    """(mixer, its options, feed-forward, its options) of every layer, sizes worked out."""
    pattern = []
    for entry, mixer, ffn in layer_options(model):
        if isinstance(mixer, AttentionOptions):
            _, key_value_heads, head_dim = mixer.sizes(model)
            mixer = dataclasses.replace(
                mixer, num_key_value_heads=key_value_heads, head_dim=head_dim
            )
        if isinstance(ffn, DenseOptions):
            ffn = dataclasses.replace(ffn, hidden_dim=ffn.size(model))
        pattern.append((entry.mixer, mixer, entry.ffn, ffn))
    return [pattern[i % len(pattern)] for i in range(model.num_layers)]


def _comparable(options: Any) -> dict[str, Any]:
    """Options as a dict without what does not change the function."""
    values = dataclasses.asdict(options)
    values.pop("implementation", None)
    if isinstance(options, AttentionOptions):
        values["rope"] = {"fraction": options.rope.fraction, **rope.write(options.rope)}
        if options.scale == options.head_dim**-0.5:
            values["scale"] = None
    return values
