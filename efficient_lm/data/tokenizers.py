"""Tokenizers: bytes, characters, and any Hugging Face `tokenizer.json`."""

import abc
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from efficient_lm.config import DataConfig
from efficient_lm.data import synthetic
from efficient_lm.data.sources import read_documents
from efficient_lm.errors import DataError

SETTINGS_FILE = "tokenizer_config.json"
HUGGING_FACE_FILE = "tokenizer.json"
# Names of the token that separates documents, tried in order where no settings file names it.
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    `vocabulary_size` is the highest id plus one; `byte_lengths` [V] says how many UTF-8 bytes each
    token stands for (0 for special tokens), so that bits per byte can be counted from token losses;
    `end_of_text` is the id that separates documents, or None.
    """

    vocabulary_size: int
    byte_lengths: Int32[np.ndarray, "V"]
    end_of_text: int | None = None

    @abc.abstractmethod
    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        """Token ids of `text`, without any token added before or after it."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids; special tokens are left out.

        Broken UTF-8 and, where ids are bytes or characters, unknown ids become U+FFFD.
        """

    @abc.abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write into `directory` (made if missing) what `load_tokenizer` needs."""

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8, id = byte."""

    vocabulary_size = 256
    byte_lengths = np.ones(256, np.int32)

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        data = np.where((ids >= 0) & (ids < 256), ids, 0xFF).astype(np.uint8)  # 0xFF: never UTF-8
        return data.tobytes().decode("utf-8", errors="replace")

    def save(self, directory: str | Path) -> None:
        _write_settings(directory, {"kind": "bytes"})


class CharacterTokenizer(Tokenizer):
    """One token a character; ids follow the sorted characters of a text, as in nanoGPT's recipe."""

    def __init__(self, characters: Iterable[str]):
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise DataError("a character tokenizer needs at least one character; the text is empty")
        self.vocabulary_size = len(self.characters)
        self.byte_lengths = np.array([len(c.encode("utf-8")) for c in self.characters], np.int32)
        self._codes = np.array([ord(c) for c in self.characters], np.uint32)

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = np.searchsorted(self._codes, codes)
        known = self._codes[np.minimum(ids, self.vocabulary_size - 1)] == codes
        if not known.all():
            place = int(np.argmin(known))
            raise DataError(
                f"character {text[place]!r} at offset {place} is not among the "
                f"{self.vocabulary_size} characters of the training text; use tokenizer='bytes'"
            )
        return ids.astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = range(self.vocabulary_size)
        return "".join(self.characters[int(i)] if int(i) in known else "\ufffd" for i in ids)

    def save(self, directory: str | Path) -> None:
        _write_settings(directory, {"kind": "characters", "characters": self.characters})


class IntegerTokenizer(Tokenizer):
    """Ids written as numbers, "3 1 4", for synthetic tasks; no token stands for bytes."""

    def __init__(self, vocabulary_size: int):
        self.vocabulary_size = vocabulary_size
        self.byte_lengths = np.zeros(vocabulary_size, np.int32)

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        words = text.split()
        for word in words:
            if not word.isdecimal() or int(word) >= self.vocabulary_size:
                raise DataError(
                    f"{word!r} is not a token of this task; give numbers from 0 to "
                    f"{self.vocabulary_size - 1}, separated by spaces"
                )
        return np.array([int(word) for word in words], np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return " ".join(str(int(i)) for i in ids)

    def save(self, directory: str | Path) -> None:
        settings = {"kind": "integers", "vocabulary_size": self.vocabulary_size}
        _write_settings(directory, settings)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` package.

    Args:
      path: the file; a `tokenizer_config.json` beside it names the end-of-text token (`eos_token`),
        otherwise the first of END_OF_TEXT_NAMES in the vocabulary is taken.
    """

    def __init__(self, path: str | Path):
        import tokenizers

        path = Path(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise DataError(f"cannot read tokenizer {path}: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary_size = max(ids.values()) + 1
        self.byte_lengths = _byte_lengths(self._tokenizer, ids, self.vocabulary_size)
        self.end_of_text = _end_of_text(path.parent / SETTINGS_FILE, ids)

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    def save(self, directory: str | Path) -> None:
        name = None if self.end_of_text is None else self._tokenizer.id_to_token(self.end_of_text)
        _write_settings(directory, {"eos_token": name})
        self._tokenizer.save(str(Path(directory) / HUGGING_FACE_FILE))


def make_tokenizer(config: DataConfig, texts: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names; for a synthetic task, that of its numbers.

    Args:
      config: `tokenizer` is "bytes", "characters" or the path of a tokenizer.json or of a directory
        with one.
      texts: where "characters" takes its characters from; None: all documents of `config`.
    """
    if config.source in synthetic.TASKS:
        return IntegerTokenizer(synthetic.make_task(config).vocabulary_size)
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer == "characters":
        if texts is None:
            # Both splits, as in nanoGPT: a rare character may occur in the validation text only.
            texts = (t for split in ("train", "valid") for t in read_documents(config, split))
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return CharacterTokenizer(characters)
    return load_tokenizer(config.tokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from what `save` wrote, a Hugging Face directory or a tokenizer.json."""
    path = Path(path).expanduser()
    if path.is_file():
        return HuggingFaceTokenizer(path)
    if (path / HUGGING_FACE_FILE).is_file():
        return HuggingFaceTokenizer(path / HUGGING_FACE_FILE)
    settings = _read_settings(path / SETTINGS_FILE)
    if settings.get("kind") == "bytes":
        return ByteTokenizer()
    if settings.get("kind") == "characters" and "characters" in settings:
        return CharacterTokenizer(settings["characters"])
    if settings.get("kind") == "integers" and "vocabulary_size" in settings:
        return IntegerTokenizer(settings["vocabulary_size"])
    raise DataError(
        f"no tokenizer at {path}; give 'bytes', 'characters', a tokenizer.json or a directory "
        f"with {HUGGING_FACE_FILE} or {SETTINGS_FILE}"
    )


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a directory has what `load_tokenizer` reads."""
    directory = Path(directory).expanduser()
    kind = _read_settings(directory / SETTINGS_FILE).get("kind")
    return (directory / HUGGING_FACE_FILE).is_file() or kind in ("bytes", "characters", "integers")


def check_vocabulary(tokenizer: Tokenizer, model_vocabulary_size: int) -> None:
    """DataError if the tokenizer has ids that a model of this vocabulary size cannot embed."""
    if tokenizer.vocabulary_size > model_vocabulary_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocabulary_size} tokens, the model "
            f"{model_vocabulary_size}; set config.model.vocabulary_size="
            f"{tokenizer.vocabulary_size} or more, or use the model's own tokenizer"
        )


def _write_settings(directory: str | Path, settings: dict) -> None:
    path = Path(directory) / SETTINGS_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


def _read_settings(path: Path) -> dict:
    """The settings, {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _end_of_text(settings_path: Path, ids: dict[str, int]) -> int | None:
    settings = _read_settings(settings_path)
    name = settings.get("eos_token")
    if isinstance(name, dict):  # a serialised AddedToken
        name = name.get("content")
    if name is None and "eos_token" not in settings:
        name = next((n for n in END_OF_TEXT_NAMES if n in ids), None)
    return ids.get(name)


def _byte_lengths(tokenizer, ids: dict[str, int], size: int) -> Int32[np.ndarray, "V"]:
    """UTF-8 bytes each token adds to the decoded text; 0 for special tokens and unused ids.

    Byte-level BPE writes each byte as one character of an alphabet of 256; sentencepiece-like
    vocabularies write a space as U+2581 and bytes outside the vocabulary as <0xHH>.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    parts = json.loads(tokenizer.to_str())
    byte_level = _has_type(parts.get("decoder"), "ByteLevel")
    alphabet = set(ByteLevel.alphabet())
    added = {token["content"]: token for token in parts["added_tokens"]}
    lengths = np.zeros(size, np.int32)
    for token, index in ids.items():
        if token in added:
            lengths[index] = 0 if added[token]["special"] else len(token.encode("utf-8"))
        elif byte_level and alphabet.issuperset(token):
            lengths[index] = len(token)
        elif not byte_level and len(token) == 6 and token.startswith("<0x") and token[-1] == ">":
            lengths[index] = 1
        else:
            lengths[index] = len(token.replace("\u2581", " ").encode("utf-8"))
    return lengths


def _has_type(part, name: str) -> bool:
    """Whether a component of tokenizer.json is, or contains, a component of type `name`."""
    if isinstance(part, dict):
        return part.get("type") == name or any(_has_type(p, name) for p in part.values())
    return isinstance(part, list) and any(_has_type(p, name) for p in part)
