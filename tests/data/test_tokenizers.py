"""Tokenizers: round trips, byte lengths, saving, errors."""

import json

import numpy as np
import pytest
import tokenizers as hf

from efficient_lm.config import DataConfig
from efficient_lm.data import tokenizers
from efficient_lm.errors import DataError

TEXT = "def f(x):\n    return 'naïve café' + \"日本語 🙂\"  # tab\there\r\n"


def byte_level_file(directory):
    """A byte-level BPE trained on TEXT, saved as tokenizer.json; its special token comes first."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_tokens(["é日"])
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def byte_fallback_file(directory):
    """A sentencepiece-like BPE: U+2581 for spaces, <0xHH> for what the vocabulary lacks."""
    vocabulary = {"<unk>": 0, "</s>": 1}
    for token in [f"<0x{b:02X}>" for b in range(256)] + list("abcdé") + ["\u2581", "\u2581a"]:
        vocabulary[token] = len(vocabulary)
    tokenizer = hf.Tokenizer(
        hf.models.BPE(vocabulary, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = hf.normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = hf.decoders.Sequence(
        [hf.decoders.Replace("\u2581", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def make(kind, directory):
    if kind == "byte_level":
        return tokenizers.load_tokenizer(byte_level_file(directory))
    if kind == "byte_fallback":
        return tokenizers.load_tokenizer(byte_fallback_file(directory))
    return tokenizers.make_tokenizer(DataConfig(tokenizer=kind), [TEXT])


@pytest.mark.parametrize("kind", ["bytes", "characters", "byte_level", "byte_fallback"])
def test_round_trip_byte_lengths_and_saving(kind, tmp_path):
    tokenizer = make(kind, tmp_path)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32 and ids.max() < tokenizer.vocabulary_size
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.byte_lengths.shape == (tokenizer.vocabulary_size,)
    assert tokenizer.byte_lengths[ids].sum() == len(TEXT.encode())
    if tokenizer.end_of_text is not None:
        assert tokenizer.byte_lengths[tokenizer.end_of_text] == 0
    assert len(tokenizer.encode("")) == 0
    np.testing.assert_array_equal(tokenizer.encode_batch(["a", TEXT])[1], ids)

    tokenizer.save(tmp_path / "run" / "tokenizer")
    again = tokenizers.load_tokenizer(tmp_path / "run" / "tokenizer")
    np.testing.assert_array_equal(again.encode(TEXT), ids)
    np.testing.assert_array_equal(again.byte_lengths, tokenizer.byte_lengths)
    assert again.end_of_text == tokenizer.end_of_text
    assert again.vocabulary_size == tokenizer.vocabulary_size


def test_bytes_are_their_own_ids():
    tokenizer = tokenizers.ByteTokenizer()
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_ids_of_a_padded_vocabulary_decode_to_a_mark():
    for tokenizer in (tokenizers.ByteTokenizer(), tokenizers.CharacterTokenizer("abc")):
        good = tokenizer.encode("b").tolist()
        assert tokenizer.decode([*good, 300, *good]) == "b\ufffdb"


def test_tasks_have_numbers_for_a_language(tmp_path):
    config = DataConfig(source="induction")
    tokenizer = tokenizers.make_tokenizer(config)
    tokenizer.save(tmp_path)
    for each in (tokenizer, tokenizers.load_tokenizer(tmp_path)):
        assert each.encode("3 0 15").tolist() == [3, 0, 15] and each.decode([3, 0]) == "3 0"
        assert not each.byte_lengths.any() and each.vocabulary_size == 16
        for bad in ("16", "x", "-1"):
            with pytest.raises(DataError, match=rf"'{bad}' is not a token.*from 0 to 15"):
                each.encode(bad)


def test_character_ids_follow_the_sorted_text_and_unknown_characters_are_named():
    tokenizer = tokenizers.make_tokenizer(DataConfig(tokenizer="characters"), ["hello", " world"])
    assert tokenizer.characters == "".join(sorted(set("hello world")))
    with pytest.raises(DataError, match=r"'!' at offset 2.*bytes"):
        tokenizer.encode("he!")


def test_settings_name_the_end_of_text_token(tmp_path):
    path = byte_level_file(tmp_path)
    assert tokenizers.load_tokenizer(path).end_of_text == 0
    settings = {"eos_token": {"content": "é日"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizers.load_tokenizer(tmp_path).end_of_text == 300


def test_errors_name_the_path(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer at .*nowhere"):
        tokenizers.load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read tokenizer .*tokenizer\.json"):
        tokenizers.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    for settings, message in (
        ('{"kind": "characters"}', "no tokenizer at"),
        ("[", r"cannot read .*tokenizer_config\.json"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(settings)
        with pytest.raises(DataError, match=message):
            tokenizers.load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"cannot write .*file/tokenizer_config\.json"):
        (tmp_path / "file").write_text("")
        tokenizers.ByteTokenizer().save(tmp_path / "file")


def test_vocabulary_must_fit_the_model():
    tokenizers.check_vocabulary(tokenizers.ByteTokenizer(), 256)
    with pytest.raises(DataError, match=r"256 tokens, the model 255.*vocabulary_size=256"):
        tokenizers.check_vocabulary(tokenizers.ByteTokenizer(), 255)
