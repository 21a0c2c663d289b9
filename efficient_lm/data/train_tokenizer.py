"""Door: train a byte-level BPE: python -m efficient_lm.data.train_tokenizer --paths=F --out=DIR"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from absl import flags

from efficient_lm import cli
from efficient_lm.config import Config
from efficient_lm.data.pipeline import read_documents
from efficient_lm.data.tokenizers import HUGGING_FACE_FILE, HuggingFaceTokenizer
from efficient_lm.errors import DataError

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 257  # every byte, and end of text


def train_tokenizer(
    texts: Iterable[str], vocabulary_size: int, directory: str | Path
) -> HuggingFaceTokenizer:
    """Train a byte-level BPE with GPT-2's word pattern on `texts` and save it in `directory`.

    Raises:
      DataError: `vocabulary_size` is below SMALLEST, or the texts are too few to fill it.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocabulary_size < SMALLEST:
        raise DataError(f"vocabulary_size={vocabulary_size}; it must be at least {SMALLEST}")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() < vocabulary_size:
        raise DataError(
            f"the text yields {bpe.get_vocab_size()} tokens, not vocabulary_size={vocabulary_size};"
            " give more text or a smaller vocabulary"
        )
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / HUGGING_FACE_FILE
        bpe.save(str(path))
        tokenizer = HuggingFaceTokenizer(path)
    tokenizer.save(directory)
    return tokenizer


def define_flags() -> None:
    flags.DEFINE_enum("source", "text", ("python_stdlib", "text", "jsonl", "parquet",
                      "hugging_face"), "Kind of data, as config.data.source.")  # fmt: skip
    flags.DEFINE_multi_string("paths", [], "A file, folder or glob; may be repeated.")
    flags.DEFINE_string("text_field", "text", "Field of jsonl, parquet and hugging_face rows.")
    flags.DEFINE_float("valid_fraction", 0.1, "Share of the text to leave out, for validation.")
    flags.DEFINE_integer("vocabulary_size", 8192, "Number of tokens.")
    flags.DEFINE_string("out", None, "Folder for tokenizer.json.", required=True)


def main() -> None:
    values = flags.FLAGS
    names = ("source", "paths", "text_field", "valid_fraction")
    config = Config.from_dict({"data": {name: values[name].value for name in names}}).data
    texts = read_documents(config, "train")
    tokenizer = train_tokenizer(texts, values.vocabulary_size, values.out)
    print(f"{values.out}: {tokenizer.vocabulary_size} tokens; use it with "
          f"--config.data.tokenizer={values.out}")  # fmt: skip


if __name__ == "__main__":
    define_flags()
    cli.run_door(main)
