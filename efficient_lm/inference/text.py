"""Tokens to text while they arrive: no half characters, nothing of a stop string."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

BROKEN = "\ufffd"  # what decoders put for bytes that are no (or not yet a) character
# An unfinished character has at most three bytes; longer runs are truly broken.
LONGEST_UNFINISHED = 3


@runtime_checkable
class Decoder(Protocol):
    """What this needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """The text of one row. `feed` gives what is certain by now, `flush` the rest.

    All pieces joined are the text of all tokens, cut before the first stop string. Attributes:
    tokens: those taken so far, the one that completed a stop string included.
    stopped: the stop string that was found, or None; later tokens are not taken.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self.tokens: list[int] = []
        self.stopped: str | None = None
        # Tokens from `_context` are decoded; those before `_read` only because some decoders
        # treat the first token of a text in another way. `_shown` characters of the rest are out.
        self._context = self._read = self._shown = 0
        self._held = ""  # decoded, but perhaps the beginning of a stop string

    def feed(self, tokens: Sequence[int]) -> str:
        """Take tokens; return the text that they make certain."""
        if not self._stop:
            self.tokens.extend(tokens)
            return self._decode(final=False)
        text = ""
        for token in tokens:  # one by one, so that the cut does not depend on the chunks
            if self.stopped is not None:
                break
            self.tokens.append(token)
            text += self._cut(self._decode(final=False), final=False)
        return text

    def flush(self) -> str:
        """The text that was held back; call it once, after the last token."""
        if self.stopped is not None:
            return ""
        return self._cut(self._decode(final=True), final=True)

    def _decode(self, *, final: bool) -> str:
        """Text that was not given out before and that further tokens cannot change."""
        context = self._tokenizer.decode(self.tokens[self._context : self._read])
        whole = self._tokenizer.decode(self.tokens[self._context :])
        certain = whole
        if not final:
            tail = len(whole) - len(whole.rstrip(BROKEN))
            certain = whole[: len(whole) - min(tail, LONGEST_UNFINISHED)]
        start = len(context) + self._shown
        text = certain[start:]
        if certain == whole:
            self._context, self._read, self._shown = self._read, len(self.tokens), 0
        else:
            self._shown += len(text)
        return text

    def _cut(self, text: str, *, final: bool) -> str:
        """`text` up to a stop string, without what may be the beginning of one."""
        text = self._held + text
        self._held = ""
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            place, self.stopped = min(found)
            return text[:place]
        if not final:
            longest = max((_overlap(text, stop) for stop in self._stop), default=0)
            if longest:
                text, self._held = text[:-longest], text[-longest:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
