"""Token ids -> text piece by piece: what is shown while the model still writes."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from rayllm.text.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes tokens as they come; the pieces join to what `Tokenizer.decode` gives for all of them at once.

    A token may end within a UTF-8 character: its bytes are held back until the rest of the character has come. Special
    tokens come out by their names, as in `decode`; leave them out before where they are not to be shown.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain with these tokens; may be empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """What was held back at the end, U+FFFD for a character that was never finished; then starts anew."""
        held_back = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return held_back


class AnswerStream:
    """The text of one answer as its tokens come: prose outside tool blocks, cut before the first of the `stop` texts.

    A text that may be the beginning of a stop text is held back until that is known; so are half characters.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        """Whether a stop text has come; nothing follows it."""
        self._decoder = StreamDecoder(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self._vocab_size = tokenizer.vocab_size
        self._special_ids = {tokenizer.special_id(name) for name in tokenizer.special_tokens}
        self._closes = {
            tokenizer.special_id(f"<|{block}_start|>"): tokenizer.special_id(f"<|{block}_end|>")
            for block in ("python", "output")
        }
        self._awaited_end: int | None = None  # of the block we are in

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens; returns the text that is now certain."""
        return self._release(self._decoder.push(self._prose(token_ids)), keep_back=True)

    def finish(self) -> str:
        """The text held back to the end."""
        return self._release(self._decoder.flush(), keep_back=False)

    def _prose(self, token_ids: Iterable[int]) -> list[int]:
        """As `answer_text` tells prose from the rest; ids that the tokenizer has no text for are left out, too."""
        prose = []
        for token_id in token_ids:
            if token_id in self._closes:
                self._awaited_end = self._closes[token_id]
            elif token_id == self._awaited_end:
                self._awaited_end = None
            elif self._awaited_end is None and token_id < self._vocab_size and token_id not in self._special_ids:
                prose.append(token_id)
        return prose

    def _release(self, text: str, *, keep_back: bool) -> str:
        if self.is_stopped:
            return ""
        self._held += text
        found = [idx for stop in self._stop if (idx := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            released, self._held = self._held[: min(found)], ""
            return released
        num_kept = self._num_undecided() if keep_back else 0
        num_released = len(self._held) - num_kept
        released, self._held = self._held[:num_released], self._held[num_released:]
        return released

    def _num_undecided(self) -> int:
        """Characters at the end that a stop text may begin with."""
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return max(lengths, default=0)
