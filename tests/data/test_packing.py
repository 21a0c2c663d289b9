"""Packing: documents apart, positions restart, end-of-text as context and label, full rows."""

import itertools

import numpy as np
import pytest

from efficient_lm.data.corpus import Corpus, build_corpus
from efficient_lm.data.packing import concat_then_split, first_fit, make_batch
from efficient_lm.data.tokenizers import ByteTokenizer

END = 0


class TokenizerWithEnd(ByteTokenizer):
    end_of_text = END


def random_documents(rng, count=40, longest=60):
    """Documents of one letter each, so that tokens tell the document."""
    return [chr(ord("0") + i) * int(rng.integers(1, longest)) for i in range(count)]


def test_a_corpus_reads_across_its_pieces(rng):
    whole = rng.integers(100, size=50).astype(np.uint16)
    cuts = (0, 7, 7, 20, 50)
    pieces = tuple(whole[a:b] for a, b in itertools.pairwise(cuts))
    corpus = Corpus(pieces, np.array([0, 9, 20]))
    assert len(corpus) == 50
    for start, stop in [(0, 50), (3, 8), (7, 20), (6, 7), (19, 60), (50, 55)]:
        np.testing.assert_array_equal(corpus.read(start, stop), whole[start:stop])
    np.testing.assert_array_equal(corpus.boundaries(5, 20), [4])


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), TokenizerWithEnd()])
@pytest.mark.parametrize("packing", ["first_fit", "concat_then_split"])
def test_labels_never_cross_documents_and_all_tokens_are_scored_once(tokenizer, packing, rng):
    documents = random_documents(rng)
    corpus = build_corpus(documents, tokenizer, "test")
    if packing == "first_fit":
        rows = first_fit(corpus, rng.permutation(len(documents)), 32)
    else:
        rows = concat_then_split(corpus, 32)
    batch = make_batch(corpus, rows, 32, mask_across_documents=True)
    scored = batch["weights"] > 0
    for row in range(len(rows)):
        segments = batch["segment_ids"][row]
        for segment in set(segments.tolist()) - {0}:
            here = segments == segment
            tokens = batch["tokens"][row][here]
            letters = set(tokens.tolist()) | set(batch["labels"][row][here & scored[row]].tolist())
            assert len(letters - {END}) == 1
            np.testing.assert_array_equal(batch["positions"][row][here], np.arange(here.sum()))
            if tokenizer.end_of_text is not None:  # only at the beginning of a segment
                assert END not in tokens[1:].tolist()
    counts = np.bincount(batch["labels"][scored], minlength=256)
    for document in documents:
        letter = ord(document[0])
        # Without end of text the first token of a document has no context.
        assert counts[letter] == len(document) - (tokenizer.end_of_text is None)
    assert counts[END] == (0 if tokenizer.end_of_text is None else len(documents))


def test_end_of_text_is_the_context_of_the_first_token_and_the_label_of_the_last():
    corpus = build_corpus(["ab", "c"], TokenizerWithEnd(), "test")
    batch = make_batch(corpus, [[(0, 8)]], 8, mask_across_documents=True)
    a, b, c = b"abc"
    assert batch["tokens"][0].tolist() == [END, a, b, END, c, 0, 0, 0]
    assert batch["labels"][0].tolist() == [a, b, END, c, END, 0, 0, 0]
    assert batch["weights"][0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert batch["positions"][0].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert batch["segment_ids"][0].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]


def test_first_fit_fills_rows_and_cuts_long_documents():
    documents = ["a" * 21, "b" * 6, "c" * 5, "d" * 3, "e"]
    corpus = build_corpus(documents, ByteTokenizer(), "test")
    rows = first_fit(corpus, np.arange(5), 8)
    # Inputs are a token less than the document: 20 = 8 + 8 + 4, then 5, 4, 2 and none.
    assert [[length for _, length in row] for row in rows] == [[8], [8], [4, 4], [5, 2]]


def test_first_fit_wastes_little(rng):
    documents = random_documents(rng, count=2000, longest=100)
    corpus = build_corpus(documents, ByteTokenizer(), "test")
    rows = first_fit(corpus, rng.permutation(len(corpus.document_starts)), 128)
    used = sum(length for row in rows for _, length in row)
    assert max(sum(length for _, length in row) for row in rows) <= 128
    assert used / (128 * len(rows)) > 0.97


def test_unmasked_rows_are_one_segment():
    corpus = build_corpus(["ab", "cd"], ByteTokenizer(), "test")
    batch = make_batch(corpus, [[(0, 3)]], 4, mask_across_documents=False)
    assert batch["segment_ids"][0].tolist() == [1, 1, 1, 0]
    assert batch["positions"][0].tolist() == [0, 1, 2, 0]
    assert batch["weights"][0].tolist() == [1, 1, 1, 0]
