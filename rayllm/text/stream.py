"""Token ids -> text piece by piece: what is shown while the model still writes."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

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
