"""JSON lines and Parquet: the rows of each split, and errors that name file and line."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from efficient_lm.config import DataConfig
from efficient_lm.data import records, sources
from efficient_lm.errors import DataError

TEXTS = [f"text {i} é" for i in range(200)]


def write_jsonl(path, texts=TEXTS):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps({"text": t, "id": 1}) for t in texts) + "\n\n")


def write_parquet(path, texts=TEXTS):
    table = pyarrow.table({"text": texts, "id": [1] * len(texts)})
    pyarrow.parquet.write_table(table, path, row_group_size=30)


WRITERS = {"jsonl": write_jsonl, "jsonl.gz": write_jsonl, "parquet": write_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_rows_are_split_by_number(suffix, tmp_path):
    WRITERS[suffix](tmp_path / f"a.{suffix}")
    (tmp_path / "README").write_text("not data")
    source = suffix.removesuffix(".gz")
    config = DataConfig(source=source, paths=(str(tmp_path),), valid_fraction=0.2)
    train = list(sources.read_documents(config, "train"))
    valid = list(sources.read_documents(config, "valid"))
    assert 20 <= len(valid) <= 60
    assert sorted(train + valid) == sorted(TEXTS)
    assert list(sources.read_documents(config, "train")) == train
    whole = DataConfig(source=source, paths=config.paths, valid_paths=config.paths)
    assert list(sources.read_documents(whole, "valid")) == TEXTS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body": "x"}', r"a\.jsonl:3 has no text field 'text' .*its fields: body"),
        (b'{"text": 3}', r"a\.jsonl:3 has no text field"),
        (b'["text"]', r"a\.jsonl:3 has no text field"),
        (b'{"text": "x"', r"a\.jsonl:3 is not JSON"),
        (b'{"text": "caf\xe9"}', r"a\.jsonl:3 is not UTF-8 at byte 13"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        list(records.read_jsonl(path, "text", lambda number: True))


def test_bad_files_are_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl\.gz"):
        list(records.read_jsonl(tmp_path / "a.jsonl.gz", "text", lambda number: True))
    write_jsonl(tmp_path / "b.jsonl.gz")
    whole = (tmp_path / "b.jsonl.gz").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot read .*b\.jsonl\.gz"):
        list(records.read_jsonl(tmp_path / "b.jsonl.gz", "text", lambda number: True))
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet"):
        list(records.read_parquet(tmp_path / "a.parquet", "text", lambda number: True))


def test_parquet_columns_and_nulls_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, ["a", None])
    with pytest.raises(DataError, match=r"a\.parquet has no column 'body'.*columns: text, id"):
        list(records.read_parquet(path, "body", lambda number: True))
    with pytest.raises(DataError, match=r"a\.parquet row 2: 'text' is not a string"):
        list(records.read_parquet(path, "text", lambda number: True))


def test_a_missing_extra_says_how_to_install_it():
    with pytest.raises(DataError, match=r"no_such_module.*pip install 'efficient_lm\[data\]'"):
        records.import_extra("no_such_module")


def test_sources_without_text_files_are_refused():
    with pytest.raises(DataError, match="'tokens' has no text"):
        list(sources.read_documents(DataConfig(source="tokens"), "train"))
