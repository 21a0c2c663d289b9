"""Files and splits: what is found, where it goes, what is refused."""

import pytest

from efficient_lm.config import DataConfig
from efficient_lm.data import sources
from efficient_lm.errors import DataError


def write_files(directory, count):
    for i in range(count):
        path = directory / f"folder{i % 3}" / f"file{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text {i}\n")


def documents(split, **options):
    return list(sources.read_documents(DataConfig(source="text", **options), split))


def test_files_split_into_disjoint_parts_whatever_the_folder_is_called(tmp_path):
    splits = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_files(tmp_path / name, 40)
        paths = (str(tmp_path / name),)
        train, valid = documents("train", paths=paths), documents("valid", paths=paths)
        assert sorted(train + valid) == sorted(f"text {i}\n" for i in range(40))
        assert 1 <= len(valid) <= 12
        assert documents("valid", paths=(f"{tmp_path}/{name}/**/*.txt",)) == valid
        splits.append(valid)
    assert splits[0] == splits[1]


def test_two_files_give_one_to_each_split(tmp_path):
    write_files(tmp_path, 2)
    paths = (str(tmp_path),)
    assert len(documents("train", paths=paths)) == len(documents("valid", paths=paths)) == 1


def test_a_single_file_is_cut_by_characters(tmp_path):
    path = tmp_path / "a.txt"
    text = "é".join(map(str, range(100))) + "\r\n"
    path.write_bytes(text.encode())
    cut = int(len(text) * 0.9)
    assert documents("train", paths=(str(path),)) == [text[:cut]]
    assert documents("valid", paths=(str(path),)) == [text[cut:]]


def test_valid_paths_override_the_split(tmp_path):
    (tmp_path / "a.txt").write_text("train")
    (tmp_path / "b.txt").write_text("valid")
    options = {"paths": (f"{tmp_path}/a.txt",), "valid_paths": (f"{tmp_path}/b.txt",)}
    assert documents("train", **options) == ["train"]
    assert documents("valid", **options) == ["valid"]


def test_the_standard_library_is_large_and_split_by_file():
    config = DataConfig()
    train = list(sources.read_documents(config, "train"))
    valid = list(sources.read_documents(config, "valid"))
    assert sum(map(len, train)) > 5e6 and 3e5 < sum(map(len, valid)) < 2e6
    assert len(train) + len(valid) == len(sources.stdlib_files())
    assert not {t for t in train if len(t) > 100} & {t for t in valid if len(t) > 100}
    folders = {part for name in sources.stdlib_files() for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages"} and "unittest" in folders


def test_equal_names_under_two_folders_are_both_kept(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    files = sources.find_files((f"{tmp_path}/one", f"{tmp_path}/two"))
    assert sorted(path.read_text() for path in files.values()) == ["one", "two"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ((), "config.data.paths is empty"),
        (("nowhere.txt",), "nowhere.txt does not exist"),
        (("*.nothing",), r"\*.nothing holds no file"),
    ],
)
def test_missing_paths_are_named(paths, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        documents("train", paths=paths)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt is not UTF-8: byte 0xe9 at offset 3"):
        documents("train", paths=(str(path),))
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"latin.txt has 0 characters"):
        documents("train", paths=(str(path),))
    path.write_bytes(b"a")
    with pytest.raises(DataError, match="nothing is left for the train split"):
        documents("train", paths=(str(path),))
