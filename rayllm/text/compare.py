"""How far tokenizers compress text: bytes per token on several kinds of it, ours beside well-known ones."""

from __future__ import annotations

import base64
import gzip
import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rayllm.text.tokenizer import Tokenizer

SAMPLES: dict[str, str] = {
    "news": """\
The city council voted 7 to 4 on Tuesday night to reopen the old harbour railway, which has stood idle since a flood
washed away two of its bridges in 1998. "People here have waited a quarter of a century for this," said Maria Lindqvist,
who chairs the transport committee. Repairs are expected to cost $46.5 million, a third of it paid by the region, and
the first trains could run as early as next autumn. Opponents warned that the budget leaves nothing for the bus lines
that serve the hillside districts, where ridership grew by almost 12 percent last year.
""",
    "code": '''\
def merge_intervals(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join the intervals that touch or overlap; the result is sorted."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


if __name__ == "__main__":
    assert merge_intervals([(8, 10), (1, 3), (2, 6)]) == [(1, 6), (8, 10)]
    print({key: len(value) for key, value in vars().items() if not key.startswith("__")})
''',
    "korean": """\
어제 저녁부터 내린 비가 아침까지 그치지 않았다. 할머니는 창가에 앉아 마당의 감나무를 바라보며
옛날이야기를 들려주셨다. 그 나무는 아버지가 태어나던 해에 심은 것이라고 하셨다. 가을이 오면 온 가족이 모여 감을 따고,
껍질을 깎아 처마 밑에 매달아 말렸다.
올해는 3월에 서리가 늦게 내려 열매가 많지 않지만, 그래도 이웃과 나누어 먹을 만큼은 될 것 같다.
""",
    "maths": r"""
\begin{theorem}\label{thm:mean}
Let $f \colon [a, b] \to \mathbb{R}$ be continuous and $g \ge 0$ integrable. Then there is a $\xi \in [a, b]$ with
\[ \int_a^b f(x)\, g(x) \,\mathrm{d}x = f(\xi) \int_a^b g(x) \,\mathrm{d}x . \]
\end{theorem}
\begin{proof}
With $m = \min f$ and $M = \max f$ we have $m\,g \le f g \le M\,g$, so the left side is $\mu \int_a^b g$ for some
$\mu \in [m, M]$, and the intermediate value theorem gives $f(\xi) = \mu$. For $g \equiv 1$ this reads
$\frac{1}{b - a} \sum_{k=1}^{n} f(x_k)\,\Delta x \to f(\xi)$ as $n \to \infty$. \qed
\end{proof}
""",
    "science": """\
Mitochondria carry a small circular genome of their own, inherited almost only from the mother. In humans it has about
16,569 base pairs and encodes 13 proteins of the respiratory chain, 22 tRNAs and 2 rRNAs; everything else is imported
through the translocases of the outer and inner membrane. The proton gradient across the inner membrane, roughly 180 mV,
drives ATP synthase at up to 100 revolutions per second, so that the free energy of oxidation (ΔG°′ ≈ −220 kJ/mol for
NADH) becomes phosphate bonds with an efficiency near 40 %.
""",
}

_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Comparison:
    """Bytes per token by kind of text and tokenizer, and each tokenizer's size."""

    vocab_sizes: dict[str, int]
    """Ids of each tokenizer, special tokens included."""
    text_bytes: dict[str, int]
    """UTF-8 bytes of each text."""
    bytes_per_token: dict[str, dict[str, float]]
    """By kind of text, then by tokenizer; more is better."""

    def as_dict(self) -> dict[str, object]:
        """For JSON, rounded to four digits."""
        ratios = self.bytes_per_token.items()
        rounded = {kind: {name: round(ratio, 4) for name, ratio in row.items()} for kind, row in ratios}
        return {"vocab_sizes": self.vocab_sizes, "text_bytes": self.text_bytes, "bytes_per_token": rounded}

    def table(self) -> str:
        """For people: a line for each kind of text, a column for each tokenizer."""
        rows = [["bytes per token", "bytes", *self.vocab_sizes]]
        rows += [
            [kind, f"{self.text_bytes[kind]:,}", *(f"{ratio:.2f}" for ratio in row.values())]
            for kind, row in self.bytes_per_token.items()
        ]
        rows.append(["vocabulary", "", *(f"{size:,}" for size in self.vocab_sizes.values())])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
        )


def compare(tokenizers: Mapping[str, Tokenizer], texts: Mapping[str, str] = SAMPLES) -> Comparison:
    """Encode every text with every tokenizer. Empty texts are left out."""
    texts = {kind: text for kind, text in texts.items() if text}
    text_bytes = {kind: len(text.encode()) for kind, text in texts.items()}
    return Comparison(
        vocab_sizes={name: tokenizer.vocab_size for name, tokenizer in tokenizers.items()},
        text_bytes=text_bytes,
        bytes_per_token={
            kind: {name: text_bytes[kind] / len(tokenizer.encode(text)) for name, tokenizer in tokenizers.items()}
            for kind, text in texts.items()
        },
    )


def load_references() -> dict[str, Tokenizer]:
    """gpt2, cl100k and o200k, as far as their rank files lie in `$RAYLLM_DATA_DIR/tokenizer`.

    Raises ValueError that names a file which is there but damaged.
    """
    root = os.environ.get("RAYLLM_DATA_DIR")
    if not root:
        return {}
    folder = Path(root).expanduser() / "tokenizer"
    found: dict[str, Tokenizer] = {}
    for name, (file_name, parse, pattern) in _REFERENCES.items():
        file = folder / file_name
        if not file.is_file():
            continue
        try:
            ranks = parse(gzip.decompress(file.read_bytes()))
            found[name] = Tokenizer(ranks, pattern, special_tokens=("<|endoftext|>",))
        except (ValueError, KeyError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            cure = f"fetch it again, or remove it to compare without {name}"
            raise ValueError(f"{file} is damaged ({error}); {cure}") from error
    return found


def _parse_tiktoken(content: bytes) -> dict[bytes, int]:
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}


def _parse_gpt2(content: bytes) -> dict[bytes, int]:
    """Ranks in GPT-2's encoder.json, which spells bytes as printable characters; its ids are in order of the merges."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = {chr(byte): byte for byte in printable}
    spelled |= {chr(0x100 + idx): byte for idx, byte in enumerate(sorted(set(range(256)) - set(printable)))}
    ids = json.loads(content)
    return {bytes(spelled[ch] for ch in token): i for token, i in ids.items() if token != "<|endoftext|>"}


_REFERENCES: dict[str, tuple[str, Callable[[bytes], dict[bytes, int]], str]] = {
    "gpt2": ("gpt2/encoder.json.gz", _parse_gpt2, _GPT2_PATTERN),
    "cl100k": ("cl100k_base.tiktoken.gz", _parse_tiktoken, _CL100K_PATTERN),
    "o200k": ("o200k_base.tiktoken.gz", _parse_tiktoken, _O200K_PATTERN),
}
