"""Generation against the parallel form, ragged batches, seeds, stops, streams and errors."""

import re

import jax
import numpy as np
import pytest

from efficient_lm.data.tokenizers import ByteTokenizer, CharacterTokenizer
from efficient_lm.errors import UserError
from efficient_lm.inference.engine import Generator, bucket, generate, stream

TOKENIZER = ByteTokenizer()
# Prompts of 1 to 8 tokens and 20 new ones make one shape (16 and 32 slots), compiled once.
PROMPTS = ["def ", "for a in", "x", "import j"]
OPTIONS = {"max_new_tokens": 20, "temperature": 1.2, "top_p": 0.95}


def argmax_continuation(model, prompt, count):
    """Greedy tokens by the parallel form on the whole sequence, token after token.

    The sequence is padded to one length behind the tokens, where causality hides it.
    """
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, len(prompt) + count), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(model(padded).logits[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ["full", "window", "mixed", "hybrid"])
def test_greedy_generation_is_the_argmax_of_the_parallel_form(models, kind):
    # Long enough for the ring of the window to go round several times.
    result = Generator(models[kind], TOKENIZER, PROMPTS[:2], max_new_tokens=20, temperature=0).run()
    for prompt, tokens in zip(PROMPTS, result.tokens, strict=False):
        expected = argmax_continuation(models[kind], TOKENIZER.encode(prompt), 20)
        assert tokens.tolist() == expected
    assert len(set(result.tokens[0].tolist())) > 3  # not one token for ever


@pytest.mark.parametrize("kind", ["mixed", "hybrid"])
def test_a_row_does_not_depend_on_the_others_nor_on_where_its_padding_is(models, kind):
    ids = [TOKENIZER.encode(prompt) for prompt in PROMPTS]
    together = Generator(models[kind], TOKENIZER, ids, seed=[3, 4, 5, 6], **OPTIONS).run().tokens
    for seed, prompt, tokens in zip((3, 4, 5, 6), ids, together, strict=True):
        alone = Generator(models[kind], TOKENIZER, [prompt], seed=seed, **OPTIONS).run().tokens
        np.testing.assert_array_equal(alone[0], tokens)
    longest = max(map(len, ids))
    padded = np.stack([np.pad(row, (longest - len(row), 0)) for row in ids])
    inside = np.stack([np.arange(longest) >= longest - len(row) for row in ids]).astype(int)
    left = Generator(
        models[kind], TOKENIZER, padded, segment_ids=inside, seed=[3, 4, 5, 6], **OPTIONS
    ).run()
    for a, b in zip(left.tokens, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_seeds_repeat_and_differ(models):
    def draw(prompts, seed):
        return generate(models["mixed"], TOKENIZER, prompts, seed=seed, **OPTIONS)

    assert draw("def ", 0) == draw("def ", 0)
    assert draw("def ", 0) != draw("def ", 1)
    same = draw(["def "] * 4, 0)
    assert len(set(same)) == 4 and same[0] == draw("def ", 0)


def test_exactly_the_tokens_asked_for(make_model):
    model = make_model("window", max_length=256)
    for count in (61, 62, 130):  # within a chunk after the first token, at its end, over three
        result = Generator(model, TOKENIZER, ["a", "bc"], max_new_tokens=count).run()
        assert [len(tokens) for tokens in result.tokens] == [count, count]
        assert result.finish_reasons == ["length", "length"]
        assert result.speed.decode_tokens == 2 * (count - 1)
        assert result.speed.prompt_tokens == 3
    one = Generator(model, TOKENIZER, ["a", "bc"], max_new_tokens=1).run()
    np.testing.assert_array_equal(one.tokens, [tokens[:1] for tokens in result.tokens])


def test_a_stream_gives_the_same_text_in_pieces(models):
    pieces = list(stream(models["mixed"], TOKENIZER, "def ", seed=5, **OPTIONS))
    assert "".join(pieces) == generate(models["mixed"], TOKENIZER, "def ", seed=5, **OPTIONS)
    assert len(pieces) > 2


def test_stop_strings_and_tokens_end_single_rows(models):
    prompts, options = PROMPTS, {"seed": [7, 8, 9, 10], **OPTIONS}
    free = Generator(models["mixed"], TOKENIZER, prompts, **options).run()
    # Three characters in the middle of row 0 that no other row has and row 0 has once.
    text = free.texts[0]
    start = next(i for i in range(5, 18) if "".join(free.texts).count(text[i : i + 3]) == 1)
    for streaming in (False, True):
        generator = Generator(
            models["mixed"], TOKENIZER, prompts, stop=text[start : start + 3], **options
        )
        if streaming:
            joined = ["".join(parts) for parts in zip(*generator.stream(), strict=True)]
            assert joined == generator.result().texts
        else:
            generator.run()
        result = generator.result()
        assert result.texts == [text[:start], *free.texts[1:]]
        assert result.finish_reasons == ["stop", "length", "length", "length"]
    token = int(free.tokens[1][10])
    result = Generator(models["mixed"], TOKENIZER, prompts, stop_tokens=[token], **options).run()
    place = free.tokens[1].tolist().index(token)
    np.testing.assert_array_equal(result.tokens[1], free.tokens[1][:place])
    assert result.finish_reasons[1] == "stop"


def test_the_context_bounds_a_row(models):
    prompts = ["a" * 60, "b"]
    result = Generator(models["full"], TOKENIZER, prompts, max_new_tokens=10, temperature=0).run()
    assert [len(tokens) for tokens in result.tokens] == [4, 10]
    assert result.finish_reasons == ["context", "length"]


def test_an_empty_prompt_starts_from_a_newline(models):
    empty, newline = (
        generate(models["mixed"], TOKENIZER, prompt, **OPTIONS) for prompt in ("", "\n")
    )
    assert empty == newline


def test_ids_that_the_tokenizer_lacks_are_never_drawn(make_model):
    tokenizer = CharacterTokenizer("abc\n")
    model = make_model("full", vocabulary_size=64)
    tokens = Generator(model, tokenizer, ["a"] * 4, max_new_tokens=20, temperature=9).run().tokens
    assert set(np.concatenate(tokens)) == {0, 1, 2, 3}


def test_nothing_is_compiled_twice(models):
    generate(models["mixed"], TOKENIZER, "a", **OPTIONS)
    compiled = len(models["mixed"].programs._compiled)
    again = models["mixed"].with_arrays(models["mixed"].arrays)
    for prompt, temperature in (("abc", 0.7), ("abcdefgh", 1.0)):
        generate(again, TOKENIZER, prompt, seed=3, **(OPTIONS | {"temperature": temperature}))
    assert len(models["mixed"].programs._compiled) == compiled


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        (["a" * 64], {}, "prompt 0 has 64 tokens; the context of this model is 64 tokens"),
        (["a", [1, 256]], {}, "prompt 1 has token ids in [1, 256]"),
        ([[0.5]], {}, "prompt 0 is neither a text nor a list of token ids"),
        ([], {}, "no prompt is given"),
        (["\udcff"], {}, "prompt 0 is not Unicode text"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens=0"),
        (["a"], {"top_p": 2.0}, "top_p=2.0"),
        (["a", "b"], {"seed": [1]}, "1 seeds are given for 2 prompts"),
        (["a"], {"seed": 2**63}, "seed=9223372036854775808; it must be a number of 64 bits"),
        (["a"], {"stop": ["x", ""]}, "a stop string is empty"),
        ([[1, 2]], {"segment_ids": [[1]]}, "segment_ids has shape (1, 1)"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(models, prompts, options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        Generator(models["full"], TOKENIZER, prompts, **options)


def test_buckets_are_few_and_never_too_small():
    sizes = {bucket(n) for n in range(1, 2049)}
    assert all(bucket(n) >= n for n in range(1, 2049)) and len(sizes) <= 12


def test_decode_writes_caches_in_place_and_copies_no_matrix(models):
    """In the compiled step no buffer of the shape of a cache or a matrix is copied."""
    model = models["mixed"]
    generator = Generator(model, TOKENIZER, PROMPTS, **OPTIONS)
    speed = generator.run().speed
    assert speed.prefill_seconds > 0 and speed.decode_seconds > 0
    assert re.fullmatch(
        r"prefill .* tokens/s \(.*\), decode .* tokens/s \(76 tokens in .*\), compile .* s",
        str(speed),
    )
    tokens = np.zeros((4, 16), np.int32)
    _, decode, seconds = model.programs.generation(model.arrays, tokens, generator._request, 32)
    assert seconds < 0.1
    text = decode.as_text()
    aliased = text[text.index("input_output_alias") :].split("\n", 1)[0]
    state = model.module.init_state(4, 32)["layers"]
    assert aliased.count("-alias)") == len(jax.tree.leaves(state)) + 3  # token, count, length
    assert "f32[16,4,4]" in text and "f32[4,2,32,4]" in text
    for shape in ("4,4,16", "16,4,4", "16,2,4", "4,2,32,4", "4,2,5,4"):
        assert not re.search(rf"= f32\[{shape}\]\S* copy\(", text), shape
