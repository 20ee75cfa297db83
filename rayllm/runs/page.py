"""A page of headings, paragraphs, tables, plots and samples, rendered as Markdown and as self-contained HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from rayllm.runs.plots import Plot, render_svg


class Code(str):
    """Text of a cell that is shown as code: a path, a command, a commit."""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row names it."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[str] = ()
    """The columns that hold numbers, set flush right."""


@dataclass(frozen=True)
class Samples:
    """(what a model was given, what it wrote) under one label."""

    label: str
    pairs: Sequence[tuple[str, str]]


Block = Heading | Paragraph | Bullets | Table | Plot | Samples


def render_markdown(title: str, blocks: Sequence[Block], plots_folder: str) -> str:
    """GitHub's Markdown; the plots are linked as `PLOTS_FOLDER/NAME.svg`, which the caller writes."""
    parts = [f"# {_md(title)}"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {_md(text)}")
            case Paragraph(text):
                parts.append(_md(text))
            case Bullets(items):
                parts.append("\n".join(f"- {_md(item)}" for item in items))
            case Table():
                parts.append(_md_table(block))
            case Plot():
                parts.append(f"![{_md(block.describe())}]({plots_folder}/{block.name}.svg)")
            case Samples(label, pairs):
                parts.append(f"{_md(label)}:")
                parts += [_md_fenced(f"{prompt}|{text}" if prompt else text) for prompt, text in pairs]
    return "\n\n".join(parts) + "\n"


def render_html(title: str, blocks: Sequence[Block]) -> str:
    """One HTML file with everything in it: no script, nothing fetched, light or dark as the reader's system is."""
    style = (resources.files("rayllm.runs") / "page.css").read_text(encoding="utf-8")
    body = "\n".join(_html_block(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_html(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{_html(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _md_table(table: Table) -> str:
    lines = ["| " + " | ".join(_md(column) for column in table.columns) + " |"]
    lines.append("|" + "|".join(" ---: " if column in table.numeric else " --- " for column in table.columns) + "|")
    lines += ["| " + " | ".join(_md(cell) for cell in row) + " |" for row in table.rows]
    return f"{_md(table.caption)}:\n\n" + "\n".join(lines)


def _md(text: str) -> str:
    """On one line, with nothing in it that Markdown or HTML would take as markup."""
    line = " ".join(_visible(text).split())
    if isinstance(text, Code) and line:
        longest = max((len(run) for run in re.findall("`+", line)), default=0)
        fence = "`" * (longest + 1)
        padding = " " if longest else ""
        return f"{fence}{padding}{line}{padding}{fence}".replace("|", r"\|")
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", line)


def _md_fenced(text: str) -> str:
    text = _visible(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _html_block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_html(text)}</h2>"
        case Paragraph(text):
            return f"<p>{_html(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_html(item)}</li>" for item in items) + "</ul>"
        case Table():
            return _html_table(block)
        case Plot():
            return f"<figure>{render_svg(block, themed=True)}</figure>"
        case Samples(label, pairs):
            texts = "".join(f"<pre><b>{_html(prompt)}</b>{_html(text)}</pre>" for prompt, text in pairs)
            return f"<figure><figcaption>{_html(label)}</figcaption>{texts}</figure>"


def _html_table(table: Table) -> str:
    of_column = ['class="number"' if column in table.numeric else "" for column in table.columns]
    head = "".join(
        f'<th scope="col" {kind}>{_html(column)}</th>' for column, kind in zip(table.columns, of_column, strict=True)
    )
    rows = []
    for row in table.rows:
        first, *rest = (
            f"<code>{_html(cell)}</code>" if isinstance(cell, Code) and cell else _html(cell) for cell in row
        )
        cells = "".join(f"<td {kind}>{cell}</td>" for cell, kind in zip(rest, of_column[1:], strict=True))
        rows.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    # A wide table scrolls in its own box, which the keyboard must be able to reach.
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{_html(table.caption)}"><table>'
        f"<caption>{_html(table.caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _html(text: str) -> str:
    return html.escape(_visible(text))


def _visible(text: str) -> str:
    """Control characters and halves of surrogate pairs as escapes: an untrained model writes those, too."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )
