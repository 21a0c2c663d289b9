"""What a model family of Hugging Face is to us: tensor names and layouts, and config fields."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from efficient_lm.config import ModelConfig, layer, layer_options, options_of
from efficient_lm.errors import ConfigError
from efficient_lm.ffn.dense import DenseOptions
from efficient_lm.fields import build
from efficient_lm.interop import rope
from efficient_lm.mixers.attention import AttentionOptions
from efficient_lm.mixers.gated_deltanet import GatedDeltaNetOptions

# Of decoders with pre-norm, RMSNorm, grouped-query attention and SwiGLU. Ours -> (theirs, layout);
# matrices are stored [out, in]. The families add to it, also several of ours for one of theirs.
MODEL_TENSORS = {
    "embedding": ("model.embed_tokens.weight", "vocabulary embed"),
    "final_norm.scale": ("model.norm.weight", "embed"),
    "head": ("lm_head.weight", "vocabulary embed"),
}
BLOCK_TENSORS = {
    "mixer_residual.norm_in.scale": ("input_layernorm.weight", "embed"),
    "ffn_residual.norm_in.scale": ("post_attention_layernorm.weight", "embed"),
    "ffn.gate": ("mlp.gate_proj.weight", "ffn embed"),
    "ffn.up": ("mlp.up_proj.weight", "ffn embed"),
    "ffn.down": ("mlp.down_proj.weight", "embed ffn"),
}
ATTENTION_TENSORS = {
    "mixer.query": ("self_attn.q_proj.weight", "(heads head_dim) embed"),
    "mixer.key": ("self_attn.k_proj.weight", "(key_value_heads head_dim) embed"),
    "mixer.value": ("self_attn.v_proj.weight", "(key_value_heads head_dim) embed"),
    "mixer.out": ("self_attn.o_proj.weight", "embed (heads head_dim)"),
    "mixer.query_bias": ("self_attn.q_proj.bias", "(heads head_dim)"),
    "mixer.key_bias": ("self_attn.k_proj.bias", "(key_value_heads head_dim)"),
    "mixer.value_bias": ("self_attn.v_proj.bias", "(key_value_heads head_dim)"),
    "mixer.out_bias": ("self_attn.o_proj.bias", "embed"),
}
QK_NORM_TENSORS = {
    "mixer.query_norm.scale": ("self_attn.q_norm.weight", "head_dim"),
    "mixer.key_norm.scale": ("self_attn.k_norm.weight", "head_dim"),
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
COUNTS = ("num_hidden_layers", "full_attention_interval")  # which layers are made of
SLIDING_FIELDS = (
    ("use_sliding_window", bool, "true or false"),
    ("max_window_layers", int, "a whole number"),
)
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


def full_attention(index: int, values: Mapping[str, Any]) -> str:
    """The kind of a layer where config.json has no `layer_types`."""
    del index, values
    return "full_attention"


@dataclass(frozen=True)
class Family:
    """One architecture.

    defaults: fields that config.json may leave out; None: worked out from others.
    only: fields with the values that we can compute; unwritten: those of them that its own
    config.json leaves out; ignored: fields without effect on models that we can compute.
    model, attention: fields of ours that all its models have.
    fields, tensors: of each mixer that it has, ours -> theirs, as ATTENTION_FIELDS and
    ATTENTION_TENSORS; names of tensors without the prefix `model.layers.N.`.
    kinds: what `layer_types` may hold, and the mixer that it means; kind_of: the kind of a layer
    from its number and the fields, where there is no `layer_types`.
    partial_rope: whether it can rotate a part of each head.
    whole: (architecture, model_type) of models for more than text, which hold this one's fields as
    `text_config` and its tensors below `prefix`; other_tensors: a pattern of what else they hold.
    """

    architecture: str
    model_type: str
    defaults: Mapping[str, Any]
    only: Mapping[str, tuple] = field(default_factory=dict)
    unwritten: tuple[str, ...] = ()
    ignored: frozenset[str] = frozenset()
    model: Mapping[str, Any] = field(default_factory=dict)
    attention: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Mapping[str, str]] = field(
        default_factory=lambda: {"attention": ATTENTION_FIELDS}
    )
    tensors: Mapping[str, Mapping[str, tuple[str, str]]] = field(
        default_factory=lambda: {"attention": ATTENTION_TENSORS}
    )
    kinds: Mapping[str, str] = field(default_factory=lambda: {"full_attention": "attention"})
    kind_of: Callable[[int, Mapping[str, Any]], str] = full_attention
    partial_rope: bool = False
    whole: tuple[str, str] | None = None
    prefix: str = "model."
    other_tensors: str | None = None

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
        if {"hidden_size", "num_attention_heads"} <= set(values) and values.get("head_dim") is None:
            values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        missing = sorted(name for name in self._required() if values.get(name) is None)
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}")
        for name in sorted(self._required() - {"rms_norm_eps"} | set(COUNTS)):
            value = values.get(name, 1)
            if (type(value) is int and value < 1) or (name in COUNTS and type(value) is not int):
                raise ConfigError(f"{name}={value!r}; it must be a whole number of at least 1")
        mixers = {
            mixer: {ours: values[theirs] for ours, theirs in fields.items()}
            for mixer, fields in self.fields.items()
        }
        rotated = rope.read(values, partial=self.partial_rope)
        mixers["attention"] |= {**self.attention, "rope": dataclasses.asdict(rotated)}
        layers = self._layers(values)
        period = next(
            p
            for p in range(1, len(layers) + 1)
            if all(entry == layers[i % p] for i, entry in enumerate(layers))
        )
        model = {ours: values[theirs] for ours, theirs in MODEL_FIELDS.items()} | {
            **self.model,
            "layers": tuple(layers[:period]),
            "mixers": mixers,
            "ffns": {"dense": {ours: values[theirs] for ours, theirs in DENSE_FIELDS.items()}},
        }
        return build(ModelConfig, model, "config.model")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """config.json for a model; ConfigError names what the architecture cannot express."""
        layers = _expand(model)
        strange = {kind for kind, _, _, _ in layers} - set(self.fields)
        if strange or not isinstance(layers[0][3], DenseOptions):
            raise ConfigError(
                f"{self.architecture} has {', '.join(self.fields)} and dense layers only; "
                f"config.model.layers has {layers[0][0]!r} and {layers[0][2]!r}"
            )
        used = {kind: options for kind, options, _, _ in reversed(layers)}
        values = {theirs: getattr(model, ours) for ours, theirs in MODEL_FIELDS.items()}
        for mixer, fields in self.fields.items():
            # config.json gives the sizes of mixers that no layer uses, too.
            options = used.get(mixer) or _sized(
                model, options_of("mixers", mixer, model.mixers.get(mixer, {}))
            )
            values |= {theirs: getattr(options, ours) for ours, theirs in fields.items()}
            if isinstance(options, AttentionOptions):
                values |= rope.write(options.rope, partial=self.partial_rope)
        values |= {theirs: getattr(layers[0][3], ours) for ours, theirs in DENSE_FIELDS.items()}
        values |= {"architectures": [self.architecture], "model_type": self.model_type}
        values |= {n: allowed[0] for n, allowed in self.only.items() if n not in self.unwritten}
        if len(self.kinds) > 1:
            names = {mixer: kind for kind, mixer in reversed(self.kinds.items())}
            windows = [getattr(options, "window", None) for _, options, _, _ in layers]
            values["layer_types"] = [
                "sliding_attention" if window else names[mixer]
                for window, (mixer, _, _, _) in zip(windows, layers, strict=True)
            ]
        if "sliding_attention" in self.kinds:
            sliding = [i for i, window in enumerate(windows) if window]
            values["use_sliding_window"] = bool(sliding)
            values["sliding_window"] = windows[sliding[0]] if sliding else None
            values["max_window_layers"] = sliding[0] if sliding else model.num_layers
        lost = differences(model, self.read(values))
        if lost:
            raise ConfigError(f"{self.architecture} cannot express {'; '.join(lost)}")
        return dict(sorted(values.items()))

    def unread(self, given: dict[str, Any]) -> list[str]:
        """Fields of config.json that nothing here reads."""
        known = self._required() | IGNORED_FIELDS
        known |= {*ROPE_FIELDS, *self.defaults, *self.only, *self.ignored}
        return sorted(set(given) - known)

    def layer_tensors(self, mixer: str) -> dict[str, tuple[str, str]]:
        """Tensors of a layer with this mixer."""
        return BLOCK_TENSORS | dict(self.tensors[mixer])

    def text_alone(self, given: dict[str, Any]) -> dict[str, Any]:
        """config.json of the text model in a model for more than text."""
        kept = IGNORED_FIELDS | {"quantization_config"}
        shared = {name: value for name, value in given.items() if name in kept}
        text = shared | given["text_config"]
        tied = [fields.get("tie_word_embeddings", False) for fields in (given, text)]
        text |= {"architectures": [self.architecture], "model_type": self.model_type}
        return text | {"tie_word_embeddings": any(tied)}

    def _required(self) -> set[str]:
        """Fields that config.json or `defaults` must give."""
        tables = (MODEL_FIELDS, DENSE_FIELDS, *self.fields.values())
        return {theirs for table in tables for theirs in table.values()}

    def _layers(self, values: dict[str, Any]) -> list[tuple]:
        """The entry of each layer in `config.model.layers`."""
        count, window = values["num_hidden_layers"], values.get("sliding_window")
        if len(self.kinds) == 1:
            return [layer()] * count
        if "sliding_attention" in self.kinds:
            for name, kind, what in SLIDING_FIELDS:
                if type(values[name]) is not kind:
                    raise ConfigError(f"{name}={values[name]!r}; it must be {what}")
        types = values.get("layer_types")
        if types is None:
            types = [self.kind_of(i, values) for i in range(count)]
        names = {kind if isinstance(kind, str) else repr(kind) for kind in types}
        if names - set(self.kinds) or len(types) != count:
            raise ConfigError(
                f"layer_types has {len(types)} entries of {sorted(names)}; it must have "
                f"num_hidden_layers={count} of {', '.join(self.kinds)}"
            )
        if "sliding_attention" in self.kinds:
            if window is None or not values["use_sliding_window"]:
                return [layer()] * count
            if type(window) is not int or window < 1:
                raise ConfigError(f"sliding_window={window!r}; it must be at least 1")
        return [
            layer(self.kinds[kind], **({"window": window} if kind == "sliding_attention" else {}))
            for kind in types
        ]


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
    pattern = [
        (entry.mixer, _sized(model, mixer), entry.ffn, _sized(model, ffn))
        for entry, mixer, ffn in layer_options(model)
    ]
    return [pattern[i % len(pattern)] for i in range(model.num_layers)]


def _sized(model: ModelConfig, options: Any) -> Any:
    """Options with the sizes that they leave to the model."""
    if isinstance(options, AttentionOptions):
        _, key_value_heads, head_dim = options.sizes(model)
        return dataclasses.replace(options, num_key_value_heads=key_value_heads, head_dim=head_dim)
    if isinstance(options, GatedDeltaNetOptions):
        _, key_heads, key_dim, value_dim = options.sizes(model)
        return dataclasses.replace(
            options, num_key_heads=key_heads, key_dim=key_dim, value_dim=value_dim
        )
    if isinstance(options, DenseOptions):
        return dataclasses.replace(options, hidden_dim=options.size(model))
    return options


def _comparable(options: Any) -> dict[str, Any]:
    """Options as a dict without what does not change the function."""
    values = dataclasses.asdict(options)
    values.pop("implementation", None)
    if isinstance(options, AttentionOptions):
        values["rope"] = {"fraction": options.rope.fraction, **rope.write(options.rope)}
        if options.scale == options.head_dim**-0.5:
            values["scale"] = None
    return values
