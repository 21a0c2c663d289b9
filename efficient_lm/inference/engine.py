"""Generation: prompts in, text out, at once or as a stream."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.errors import UserError
from efficient_lm.inference.decode import CHUNK, Request
from efficient_lm.inference.model import Model
from efficient_lm.inference.sampling import Sampling
from efficient_lm.inference.text import TextStream

# A stream shows text about this often; longer chunks waste less time between dispatches.
STREAM_SECONDS = 0.1

Prompt = str | Sequence[int] | np.ndarray


@dataclass
class Speed:
    """Where the time of a generation went. Decode counts the tokens after the first of each row."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0

    def __str__(self) -> str:
        rates = []
        for name, tokens, seconds in (
            ("prefill", self.prompt_tokens, self.prefill_seconds),
            ("decode", self.decode_tokens, self.decode_seconds),
        ):
            rate = f"{tokens / seconds:,.0f} tokens/s" if tokens and seconds else "-"
            rates.append(f"{name} {rate} ({tokens:,} tokens in {seconds:.2f} s)")
        return ", ".join(rates) + f", compile {self.compile_seconds:.1f} s"


@dataclass(frozen=True)
class Generation:
    """What was generated.

    texts: one a row, without prompt, stop token and stop string.
    tokens: ids of each row, without a stop token, with those of a stop string.
    finish_reasons: "stop" (token or string), "length" (max_new_tokens) or "context" (the prompt
      and the new tokens fill the model's max_length).
    """

    texts: list[str]
    tokens: list[np.ndarray]
    finish_reasons: list[str]
    speed: Speed


@dataclass
class _Row:
    """The host's side of one row."""

    stream: TextStream
    limit: int
    reason: str | None = None
    text: str = field(default="")


def generate(model: Model, tokenizer: Any, prompts: Any, **options) -> str | list[str]:
    """The new text that follows each prompt, without the prompt itself.

    Args:
      prompts: a text, or a list whose entries are texts or token ids; one text gives one text.
      options: those of `Generator`, such as max_new_tokens=100, temperature=0.8, seed=1.
    """
    single = isinstance(prompts, str)
    texts = Generator(model, tokenizer, [prompts] if single else prompts, **options).run().texts
    return texts[0] if single else texts


def stream(model: Model, tokenizer: Any, prompt: Prompt, **options) -> Iterator[str]:
    """The pieces of the text that `generate` returns for one prompt, as soon as they are certain.

    Characters of several tokens come whole, and nothing of a stop string comes.
    """
    for pieces in Generator(model, tokenizer, [prompt], **options).stream():
        if pieces[0]:
            yield pieces[0]


class Generator:
    """One generation for a batch of prompts.

    Args:
      model: of `load` or `Model.from_arrays`.
      tokenizer: with encode, decode, vocabulary_size and end_of_text.
      prompts: texts or token ids, of any lengths. An empty one starts from the end-of-text token,
        or from a newline where the tokenizer has none.
      max_new_tokens: at most so many a row; fewer where the row would exceed the model's
        max_length, and then its finish reason is "context".
      temperature, top_k, top_p, min_p: see `Sampling`.
      seed: row i draws from (seed, i), so its tokens do not depend on the other rows; or one seed
        a row, each drawing as row 0 of a batch with that seed.
      segment_ids: for `prompts` as an array [B, T]: 0 marks padding, at any place of a row.
      stop: strings that end a row; the text is cut before them.
      stop_tokens: ids that end a row beside the tokenizer's end-of-text token.

    Raises:
      UserError: a prompt leaves no room in the context, an id is not in the vocabulary, or an
        option is out of range.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        prompts: Any,
        *,
        max_new_tokens: int = 100,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        top_p: float | int | None = None,
        min_p: float | int | None = None,
        seed: int | Sequence[int] = 0,
        segment_ids: Any = None,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
    ):
        if tokenizer is None:
            raise UserError(
                "this model has no tokenizer, so it cannot generate text; convert it from a folder "
                "with a tokenizer.json, or load one with data.tokenizers.load_tokenizer"
            )
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens}; it must be at least 1")
        if len(prompts) == 0:
            raise UserError("no prompt is given; give at least one")
        if segment_ids is not None:
            prompts = _unpadded(prompts, segment_ids)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stop:
            raise UserError("a stop string is empty; leave it out")
        self.model = model
        self.prompts = [_encode(model, tokenizer, prompt, i) for i, prompt in enumerate(prompts)]
        room = model.config.max_length
        self._rows = [
            _Row(TextStream(tokenizer, stop), min(max_new_tokens, room - len(prompt)))
            for prompt in self.prompts
        ]
        self._wanted = max_new_tokens
        self._stop_tokens = {int(token) for token in stop_tokens}
        if tokenizer.end_of_text is not None:
            self._stop_tokens.add(int(tokenizer.end_of_text))
        size = model.config.vocabulary_size
        self._request = Request(
            keys=_keys(seed, len(prompts)),
            limits=jnp.asarray([row.limit for row in self._rows], jnp.int32),
            stop_tokens=jnp.asarray(sorted(self._stop_tokens), jnp.int32),
            sampling=Sampling(temperature, top_k, top_p, min_p).checked(),
            # A model may have more ids than the tokenizer, to make its vocabulary divisible.
            allowed=jnp.arange(size) < tokenizer.vocabulary_size
            if tokenizer.vocabulary_size < size
            else None,
        )
        self.speed = Speed(prompt_tokens=sum(map(len, self.prompts)))

    def run(self) -> Generation:
        """Generate to the end."""
        for _ in self._pieces(streaming=False):
            pass
        return self.result()

    def stream(self) -> Iterator[list[str]]:
        """New text of each row, piece by piece; `result()` is known after the last one."""
        return self._pieces(streaming=True)

    def result(self) -> Generation:
        """What `run` returns, for what was generated up to now."""
        return Generation(
            [row.text for row in self._rows],
            [np.asarray(row.stream.tokens, np.int32) for row in self._rows],
            [row.reason or "unfinished" for row in self._rows],
            self.speed,
        )

    def _pieces(self, *, streaming: bool) -> Iterator[list[str]]:
        """New text of each row after every dispatch."""
        arrays, speed, request = self.model.arrays, self.speed, self._request
        lengths = np.asarray([len(prompt) for prompt in self.prompts], np.int32)
        limits = np.asarray([row.limit for row in self._rows])
        room = self.model.config.max_length
        tokens = np.zeros((len(lengths), min(bucket(int(lengths.max())), room)), np.int32)
        for row, prompt in zip(tokens, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        slots = min(bucket(int((lengths + limits).max())), room)
        prefill, decode, speed.compile_seconds = self.model.programs.generation(
            arrays, tokens, request, slots
        )
        began = time.perf_counter()
        carry, finished = prefill(arrays, tokens, lengths, request)
        chunk, finished = np.asarray(carry.token)[:, None], np.array(finished)
        speed.prefill_seconds = time.perf_counter() - began
        yield self._take(chunk, finished)
        steps = 1 if streaming else CHUNK
        while not finished.all():
            began = time.perf_counter()
            carry, finished, chunk = decode(arrays, carry, finished, np.int32(steps), request)
            chunk, finished = np.asarray(chunk), np.array(finished)
            seconds = time.perf_counter() - began
            speed.decode_seconds += seconds
            speed.decode_tokens += int((chunk >= 0).sum())
            if streaming:
                steps = int(np.clip(steps * STREAM_SECONDS / seconds, steps / 2, steps * 2))
                steps = min(max(steps, 1), CHUNK)
            yield self._take(chunk, finished)

    def _take(self, chunk: np.ndarray, finished: np.ndarray) -> list[str]:
        """Hand new tokens [B, n] to the rows; rows that a stop string ends become finished."""
        pieces = []
        for index, row in enumerate(self._rows):
            if row.reason is not None:
                pieces.append("")
                continue
            tokens = [int(token) for token in chunk[index] if token >= 0]
            stops = bool(tokens) and tokens[-1] in self._stop_tokens
            text = row.stream.feed(tokens[:-1] if stops else tokens)
            if row.stream.stopped is not None or stops:
                row.reason = "stop"
                finished[index] = True
            elif finished[index]:
                row.reason = "length" if row.limit == self._wanted else "context"
            if row.reason is not None:
                text += row.stream.flush()
            row.text += text
            pieces.append(text)
        return pieces


def bucket(length: int) -> int:
    """`length` rounded up so that few shapes are compiled: 16, 32, ... 256, then steps of 256."""
    if length > 256:
        return -(-length // 256) * 256
    return max(16, 1 << (length - 1).bit_length())


def _encode(model: Model, tokenizer: Any, prompt: Any, index: int) -> np.ndarray:
    """The ids of one prompt, checked against the model."""
    if isinstance(prompt, str):
        try:
            ids = np.asarray(tokenizer.encode(prompt), np.int32)
        except UnicodeEncodeError as error:  # bytes of a command line that are not UTF-8
            raise UserError(f"prompt {index} is not Unicode text: {error.reason}") from None
    else:
        ids = np.asarray(prompt)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise UserError(f"prompt {index} is neither a text nor a list of token ids")
        ids = ids.astype(np.int32)
    if ids.size == 0:
        end = tokenizer.end_of_text
        start = tokenizer.encode("\n") if end is None else [end]
        # The numbers of a synthetic task have no newline.
        ids = np.asarray(start if len(start) else [0], np.int32)
    size, room = model.config.vocabulary_size, model.config.max_length
    if len(ids) >= room:
        raise UserError(
            f"prompt {index} has {len(ids)} tokens; the context of this model is {room} tokens "
            f"and one must be left to generate: shorten the prompt to {room - 1} tokens"
        )
    if ids.min() < 0 or ids.max() >= size:
        raise UserError(
            f"prompt {index} has token ids in [{ids.min()}, {ids.max()}]; this model has ids "
            f"0 to {size - 1}"
        )
    return ids


def _unpadded(prompts: Any, segment_ids: Any) -> list[np.ndarray]:
    """The rows of [B, T] without the tokens whose segment is 0."""
    prompts, segment_ids = np.asarray(prompts), np.asarray(segment_ids)
    if prompts.ndim != 2 or prompts.shape != segment_ids.shape:
        raise UserError(
            f"segment_ids has shape {segment_ids.shape} and prompts {prompts.shape}; "
            "both must be [B, T]"
        )
    return [row[segments != 0] for row, segments in zip(prompts, segment_ids, strict=True)]


def _keys(seed: int | Sequence[int], batch: int) -> jax.Array:
    """One key a row."""
    for number in [seed] if isinstance(seed, (int, np.integer)) else seed:
        if not -(2**63) <= number < 2**63:
            raise UserError(f"seed={number}; it must be a number of 64 bits with a sign")
    if isinstance(seed, (int, np.integer)):
        key = jax.random.key(int(seed))
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if len(seed) != batch:
        raise UserError(f"{len(seed)} seeds are given for {batch} prompts; give one, or one each")
    return jnp.stack([jax.random.fold_in(jax.random.key(int(s)), 0) for s in seed])
