"""The schema of a run: frozen dataclasses, built from a ConfigDict and checked before device work.

`configs/x.py` returns `Config(...).to_config_dict()`; doors apply `--config.a.b=c` to it and call
`Config.from_config_dict`, which raises ConfigError in one line that names the field.
"""

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_collections

from efficient_lm import registry
from efficient_lm.errors import ConfigError
from efficient_lm.fields import build, with_placeholders


@dataclass(frozen=True)
class LayerConfig:
    """One layer of the pattern: a mixer and a feed-forward, each with overrides of its options."""

    mixer: str = "attention"
    options: Mapping[str, Any] = field(default_factory=dict)
    ffn: str = "dense"
    ffn_options: Mapping[str, Any] = field(default_factory=dict)


def layer(mixer: str = "attention", *, ffn: str = "dense", ffn_options=None, **options) -> tuple:
    """One entry of `model.layers`: `(layer("attention", window=128),) * 3 + (layer(),)`."""
    return (mixer, options, ffn, dict(ffn_options or {}))


def choose(options: Mapping[str, Any], argument: str) -> Any:
    """The entry for the argument of `--config=x.py:argument`; ConfigError lists what is allowed."""
    if argument not in options:
        raise ConfigError(f"unknown config argument {argument!r}; allowed: {', '.join(options)}")
    return options[argument]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: `num_layers` layers that repeat the pattern `layers` (the remainder is allowed).

    `mixers` and `ffns` hold the options by registered name for all layers; an entry of `layers`
    overrides single options for its place in the pattern, also single fields of a group
    (`layer(rope={"theta": 1e6})`). Options of a method that no layer uses are checked and have no
    effect. Dimensions are in features.
    """

    vocabulary_size: int = 256
    embed_dim: int = 128
    num_layers: int = 4
    max_length: int = 1024  # longest context in tokens
    layers: tuple = (("attention", {}, "dense", {}),)
    mixers: Mapping[str, Any] = field(default_factory=dict)
    ffns: Mapping[str, Any] = field(default_factory=dict)
    norm: Literal["rms_norm", "zero_centered_rms_norm"] = "rms_norm"
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    embedding_scale: float | None = None  # None: 1; Gemma: sqrt(embed_dim)
    logits_soft_cap: float | None = None
    dropout: float = 0.0  # on the embedding and on each residual branch
    initializer: Literal["depth_scaled_normal", "normal", "fan_in"] = "depth_scaled_normal"
    initializer_scale: float = 0.02  # standard deviation of "normal" kinds
    dtype: Literal["bfloat16", "float32"] = "float32"  # of activations and matmuls
    scan_layers: bool = True  # False: faster steps on GPUs for a compile time linear in depth
    remat: Literal["none", "products", "dots", "mixer", "full", "offload"] = "none"
    ffn_tokens_at_once: int | None = None  # of a row on one device, to bound memory; None: all


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from, how it becomes tokens, and how tokens become batches."""

    source: Literal[
        "python_stdlib", "text", "jsonl", "parquet", "hugging_face", "tokens",
        "associative_recall", "copying", "induction", "needle",
    ] = "python_stdlib"  # fmt: skip
    paths: tuple[str, ...] = ()  # files, folders or globs; for hugging_face: (name, subset)
    valid_paths: tuple[str, ...] = ()  # empty: split `paths` by `valid_fraction`
    valid_fraction: float = 0.1
    text_field: str = "text"  # of jsonl, parquet and hugging_face rows
    tokenizer: str = "bytes"  # "bytes", "characters" or the path of a tokenizer.json
    sequence_length: int = 256  # tokens a row
    batch_size: int = 16  # rows a step, over all devices and processes
    packing: Literal["concat_then_split", "first_fit"] = "concat_then_split"
    mask_across_documents: bool = True  # segments: attention and labels stay within a document
    shuffle: bool = True
    seed: int = 0
    prefetch: int = 2  # batches kept ready on the device
    task: Mapping[str, Any] = field(default_factory=dict)  # options of a synthetic task


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss."""

    name: str = "autoregressive"
    z_loss: float = 0.0
    chunk_logits: int = 2**24  # logits alive at once; bounds the memory of the loss
    implementation: str = "auto"
    op = "linear_cross_entropy"  # of pallas_kernels, that `implementation` is of


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate: linear warm-up, then `name`, ending at `final_fraction` of the peak."""

    name: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2  # wsd: share of all steps spent decaying
    decay_shape: Literal["linear", "cosine", "one_minus_sqrt"] = "linear"  # wsd
    final_fraction: float = 0.1


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for all parameters, or Muon for hidden matrices with AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # matrices only
    clip_norm: float | None = 1.0  # global gradient norm; None: no clipping
    accumulation_steps: int = 1  # microbatches a step; the batch is split, not enlarged
    ema_decay: float | None = None  # None: no moving average of the weights
    muon_learning_rate: float | None = None  # None: `learning_rate` (right for "rms_match")
    muon_momentum: float = 0.95
    muon_scaling: Literal["rms_match", "width_transfer"] = "rms_match"
    muon_steps: int = 5  # Newton-Schulz iterations


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    steps: int = 1000
    seed: int = 0
    log_every: int = 10  # steps between lines of metrics
    max_nonfinite_steps: int = 10  # in a row, before the run stops
    sample_prompt: str = ""  # text continued at the end of the run; empty: a word of the data
    sample_tokens: int = 200


@dataclass(frozen=True)
class CheckpointingConfig:
    """What is kept of a run, and when."""

    every: int = 500  # steps
    keep_last: int = 3
    keep_best: int = 1  # by `best_metric` of the validation split, lower is better
    best_metric: str = "loss"


@dataclass(frozen=True)
class EvaluationConfig:
    """Perplexity on the validation split, during and after the run."""

    every: int = 500  # steps; 0: only at the end
    batches: int | None = None  # during the run; None: the whole split
    batch_size: int | None = None  # None: data.batch_size
    stride: int | None = None  # tokens scored a window; None: sequence_length (no sliding)


# The mesh axes, the outermost (slowest links) first.
MESH_AXES = ("dcn", "data", "fsdp", "expert", "ring", "sequence", "tensor")


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes, the outermost first; -1 takes the devices that the others leave.

    Rows of a batch are split over dcn, data and fsdp, tokens of a row over ring and sequence,
    heads and features over tensor.
    """

    dcn: int = 1  # slices or hosts with slow links between them
    data: int = -1
    fsdp: int = 1  # parameters are split too, and gathered layer by layer
    expert: int = 1  # reserved for mixture-of-experts
    ring: int = 1  # ring attention: keys and values travel from device to device
    sequence: int = 1  # Ulysses: tokens are exchanged for heads around each mixer
    tensor: int = 1
    heads_at_once: int | None = None  # UPipe: query heads exchanged at once; None: all (Ulysses)
    rules: Literal["fsdp", "replicated", "megatron"] = "fsdp"  # presets of parallel/rules.py


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Build and check a Config from nested mappings; ConfigError names the first bad field."""
        config = build(cls, values, "config")
        check(config)
        return config

    @classmethod
    def from_config_dict(cls, values: ml_collections.ConfigDict) -> "Config":
        """The same from what `get_config()` returned, overrides applied."""
        return cls.from_dict(values.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts with every field, defaults of used mixers included; JSON-ready."""
        values = dataclasses.asdict(self)
        pattern = layer_pattern(self.model)
        values["model"]["layers"] = tuple(dataclasses.astuple(l) for l in pattern)
        for section, used in (("mixers", [l.mixer for l in pattern]),
                              ("ffns", [l.ffn for l in pattern])):  # fmt: skip
            given = values["model"][section]
            values["model"][section] = {
                name: dataclasses.asdict(options_of(section, name, given.get(name, {})))
                for name in dict.fromkeys([*given, *used])
            }
        return values

    def to_config_dict(self) -> ml_collections.ConfigDict:
        """A ConfigDict whose fields keep their types under `--config.a.b=c`."""
        values = with_placeholders(type(self), self.to_dict())
        for section in ("mixers", "ffns"):
            groups = values["model"][section]
            for name in groups:
                groups[name] = with_placeholders(_method(section, name).Options, groups[name])
        return ml_collections.ConfigDict(values)


def options_of(section: str, name: str, given: Any):
    """The options of a method from what `model.mixers` or `model.ffns` (`section`) says of it."""
    return build(_method(section, name).Options, given, f"config.model.{section}.{name}")


def _method(section: str, name: str):
    """The class of a mixer or feed-forward."""
    return (registry.mixer if section == "mixers" else registry.feed_forward)(name)


def layer_pattern(model: ModelConfig) -> tuple[LayerConfig, ...]:
    """The pattern as LayerConfigs; entries may be names, tuples (mixer, ...) or mappings."""
    pattern = []
    for index, entry in enumerate(model.layers):
        path = f"config.model.layers[{index}]"
        if isinstance(entry, str):
            entry = (entry,)
        if isinstance(entry, (tuple, list)):
            names = [f.name for f in dataclasses.fields(LayerConfig)]
            if len(entry) > len(names):
                raise ConfigError(f"{path} has {len(entry)} parts; allowed: {', '.join(names)}")
            entry = dict(zip(names, entry, strict=False))
        entry = build(LayerConfig, entry, path)
        for part, table in (("mixer", registry.MIXERS), ("ffn", registry.FEED_FORWARDS)):
            _require_known(getattr(entry, part), table, f"{path}.{part}")
        pattern.append(entry)
    return tuple(pattern)


def layer_options(model: ModelConfig) -> tuple[tuple[LayerConfig, Any, Any], ...]:
    """(layer, mixer options, ffn options) for each entry of the pattern."""

    def options(section, name, overrides, path):
        shared = options_of(section, name, getattr(model, section).get(name, {}))
        return build(type(shared), overrides, path, shared)

    return tuple(
        (
            l,
            options("mixers", l.mixer, l.options, f"config.model.layers[{index}].options"),
            options("ffns", l.ffn, l.ffn_options, f"config.model.layers[{index}].ffn_options"),
        )
        for index, l in enumerate(layer_pattern(model))
    )


# (what is allowed, its test, fields); None is allowed where a field is optional.
RANGES = (
    ("at least 1", lambda x: x >= 1, (
        "model.vocabulary_size", "model.embed_dim", "model.num_layers", "model.max_length",
        "data.sequence_length", "data.batch_size", "objective.chunk_logits",
        "optimizer.accumulation_steps", "optimizer.muon_steps", "training.steps",
        "training.log_every", "training.max_nonfinite_steps", "checkpointing.every",
        "checkpointing.keep_last", "evaluation.batches", "evaluation.batch_size",
        "parallel.heads_at_once", "model.ffn_tokens_at_once",
    )),
    ("at least 0", lambda x: x >= 0, (
        "model.norm_epsilon", "model.initializer_scale", "data.prefetch", "objective.z_loss",
        "optimizer.weight_decay", "optimizer.schedule.warmup_steps", "training.sample_tokens",
        "checkpointing.keep_best", "evaluation.every",
    )),
    ("above 0", lambda x: x > 0, (
        "model.embedding_scale", "model.logits_soft_cap", "optimizer.learning_rate",
        "optimizer.epsilon", "optimizer.clip_norm", "optimizer.muon_learning_rate",
    )),
    ("in [0, 1)", lambda x: 0 <= x < 1, (
        "model.dropout", "optimizer.b1", "optimizer.b2", "optimizer.ema_decay",
        "optimizer.muon_momentum",
    )),
    ("in [0, 1]", lambda x: 0 <= x <= 1, (
        "optimizer.schedule.decay_fraction", "optimizer.schedule.final_fraction",
    )),
    ("between 0 and 1", lambda x: 0 < x < 1, ("data.valid_fraction",)),
    ("a number of 64 bits with a sign", lambda x: -(2**63) <= x < 2**63, ("training.seed",)),
)  # fmt: skip


def check(config: Config) -> None:
    """Raise ConfigError for combinations that cannot work; called by `from_dict`."""
    model, data, optimizer = config.model, config.data, config.optimizer

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    for allowed, holds, paths in RANGES:
        for path in paths:
            value = operator.attrgetter(path)(config)
            require(value is None or holds(value), f"config.{path}={value}; it must be {allowed}")
    require(len(model.layers) > 0, "config.model.layers is empty; give at least one layer")
    require(
        data.sequence_length <= model.max_length,
        f"config.data.sequence_length={data.sequence_length} exceeds config.model.max_length="
        f"{model.max_length}; raise max_length or shorten the sequence",
    )
    require(
        data.batch_size % optimizer.accumulation_steps == 0,
        f"config.data.batch_size={data.batch_size} is not divisible by "
        f"config.optimizer.accumulation_steps={optimizer.accumulation_steps}",
    )
    sizes = {axis: getattr(config.parallel, axis) for axis in MESH_AXES}
    for axis, size in sizes.items():
        require(
            size == -1 or size >= 1,
            f"config.parallel.{axis}={size}; allowed: -1 (the remaining devices) or at least 1",
        )
    rest = [axis for axis, size in sizes.items() if size == -1]
    require(
        len(rest) <= 1,
        f"config.parallel: {' and '.join(rest)} are -1; only one can take the rest",
    )
    require(
        sizes["expert"] == 1,
        f"config.parallel.expert={sizes['expert']}; the axis is reserved and must be 1",
    )
    stride = config.evaluation.stride
    require(
        stride is None or 1 <= stride <= data.sequence_length,
        f"config.evaluation.stride={stride}; allowed: 1 to data.sequence_length="
        f"{data.sequence_length}",
    )
    _require_known(config.objective.name, registry.OBJECTIVES, "config.objective.name")
    registry.check_implementation(config.objective, "config.objective")
    used = {l.mixer for l in layer_pattern(model)}
    for section, table in (("mixers", registry.MIXERS), ("ffns", registry.FEED_FORWARDS)):
        for name, given in getattr(model, section).items():
            require(
                name in table,
                f"unknown field config.model.{section}.{name}; {registry.suggest(name, table)}",
            )
            options = options_of(section, name, given)
            if name not in used:  # a layer can change which op it is that the name is of
                registry.check_implementation(options, f"config.model.{section}.{name}")
    for index, (l, mixer_options, ffn_options) in enumerate(layer_options(model)):
        own = "implementation" in l.options
        place = f"layers[{index}].options" if own else f"mixers.{l.mixer}"
        registry.check_implementation(mixer_options, f"config.model.{place}")
        for options in (mixer_options, ffn_options):
            try:
                options.check(model)
            except ConfigError as error:
                raise ConfigError(f"config.model.layers[{index}]: {error}") from None


def _require_known(name: str, table: Mapping[str, str], path: str) -> None:
    if name not in table:
        raise ConfigError(f"{path}={name!r} is unknown; {registry.suggest(name, table)}")
