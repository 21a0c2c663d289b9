"""Text streams: whole characters, stop strings across chunks, and the text of all tokens."""

import numpy as np
import pytest

from efficient_lm.data.tokenizers import ByteTokenizer
from efficient_lm.inference.text import TextStream

TEXT = "naïve 😀 text — déjà vu… 漢字\n"


def chunks(tokens, rng):
    """Random pieces of a sequence."""
    while len(tokens):
        size = int(rng.integers(1, 7))
        yield tokens[:size]
        tokens = tokens[size:]


@pytest.mark.parametrize("broken", [False, True])
def test_pieces_join_to_the_text_of_all_tokens(broken, rng):
    tokenizer = ByteTokenizer()
    for _ in range(50):
        tokens = tokenizer.encode(TEXT * 3).tolist()
        if broken:
            tokens = rng.choice([*tokens, 0x80, 0xE2, 0xF0, 0xFF], 80).tolist()
        stream = TextStream(tokenizer)
        pieces = [stream.feed(piece) for piece in chunks(tokens, rng)]
        if not broken:
            assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.flush() == tokenizer.decode(tokens)


def test_text_comes_as_early_as_it_is_certain():
    stream = TextStream(ByteTokenizer(), stop=["END"])
    assert stream.feed(list(b"abE")) == "ab"
    assert stream.feed(list(b"N")) == ""
    assert stream.feed(list(b"x")) == "ENx"
    assert stream.feed([0xC3]) == ""
    assert stream.feed([0xA9]) == "é"


@pytest.mark.parametrize("stop", [["vu"], ["😀 t"], ["zzz", "déjà", "à v"], ["\n", "nope"]])
def test_stop_strings_cut_the_same_text_and_tokens_whatever_the_chunks(stop, rng):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(TEXT).tolist()
    first = min((TEXT.index(s), s) for s in stop if s in TEXT)
    kept = len((TEXT[: first[0]] + first[1]).encode())
    for _ in range(20):
        stream = TextStream(tokenizer, stop)
        text = "".join(stream.feed(piece) for piece in chunks(tokens, rng)) + stream.flush()
        assert text == TEXT[: first[0]] and stream.stopped == first[1]
        assert stream.tokens == tokens[:kept]


def test_what_was_held_for_a_stop_string_is_flushed():
    stream = TextStream(ByteTokenizer(), stop=["stop"])
    assert stream.feed(np.frombuffer(b"never sto", np.uint8).tolist()) == "never "
    assert stream.flush() == "sto" and stream.stopped is None


class Leading:
    """A decoder that drops the first space of a text, as sentencepiece decoders do."""

    words = ("a", " b", " c", " d")

    def decode(self, ids):
        return "".join(self.words[i] for i in ids).removeprefix(" ")


def test_spaces_between_tokens_survive_decoders_that_strip_the_first_one():
    stream = TextStream(Leading())
    assert "".join(stream.feed([i]) for i in (1, 2, 0, 3)) + stream.flush() == "b ca d"
