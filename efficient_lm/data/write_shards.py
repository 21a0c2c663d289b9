"""Door: text to token shards: python -m efficient_lm.data.write_shards --paths=F --out=DIR"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from absl import flags

from efficient_lm import cli
from efficient_lm.config import Config
from efficient_lm.data.corpus import encode_documents
from efficient_lm.data.pipeline import read_documents
from efficient_lm.data.shards import write_token_shard
from efficient_lm.data.tokenizers import Tokenizer, make_tokenizer
from efficient_lm.errors import DataError


def write_shards(
    documents: Iterable[str], tokenizer: Tokenizer, directory: str | Path, tokens_per_shard: int
) -> int:
    """Write documents as shards 00000.bin, 00001.bin, ... into `directory`; returns the tokens.

    Documents are whole: a shard is closed by the document that reaches `tokens_per_shard`.

    Raises:
      DataError: there is no text, or the directory holds shards already.
    """
    directory = Path(directory)
    if any(directory.glob("*.bin")):
        raise DataError(f"{directory} holds token shards already; remove them or give another")
    encoded = (ids for ids in encode_documents(documents, tokenizer) if len(ids))
    total = 0
    for number in itertools.count():
        first = next(encoded, None)
        if first is None:
            break
        total += write_token_shard(
            directory / f"{number:05}.bin",
            _up_to(itertools.chain([first], encoded), tokens_per_shard),
            vocabulary_size=tokenizer.vocabulary_size,
            end_of_text=tokenizer.end_of_text,
        )
    if not total:
        raise DataError(f"there is no text to write into {directory}")
    return total


def _up_to(encoded: Iterable[np.ndarray], tokens: int) -> Iterator[np.ndarray]:
    """Documents until they have `tokens` tokens together."""
    count = 0
    for ids in encoded:
        yield ids
        count += len(ids)
        if count >= tokens:
            return


def define_flags() -> None:
    flags.DEFINE_enum("source", "text", ("python_stdlib", "text", "jsonl", "parquet",
                      "hugging_face"), "Kind of data, as config.data.source.")  # fmt: skip
    flags.DEFINE_multi_string("paths", [], "A file, folder or glob; may be repeated.")
    flags.DEFINE_multi_string("valid_paths", [], "The same for validation; default: a split.")
    flags.DEFINE_float("valid_fraction", 0.1, "Share of the text for validation.")
    flags.DEFINE_string("text_field", "text", "Field of jsonl, parquet and hugging_face rows.")
    flags.DEFINE_string("tokenizer", "bytes", "bytes, characters, or where a tokenizer.json is.")
    flags.DEFINE_integer("tokens_per_shard", 10**8, "Size of a shard.", lower_bound=1)
    flags.DEFINE_string("out", None, "Folder for train/, valid/ and tokenizer/.", required=True)


def main() -> None:
    values = flags.FLAGS
    names = ("source", "paths", "valid_paths", "valid_fraction", "text_field", "tokenizer")
    config = Config.from_dict({"data": {name: values[name].value for name in names}}).data
    tokenizer = make_tokenizer(config)
    out = Path(values.out)
    tokenizer.save(out / "tokenizer")
    for split in ("train", "valid"):
        documents = read_documents(config, split)
        count = write_shards(documents, tokenizer, out / split, values.tokens_per_shard)
        print(f"{out / split}: {count} tokens")
    print(f"use them with source='tokens', paths=('{out}/train',), valid_paths=('{out}/valid',), "
          f"tokenizer='{out}/tokenizer'")  # fmt: skip


if __name__ == "__main__":
    define_flags()
    cli.run_door(main)
