"""Plots of a run's numbers as SVG text: small, sharp at any size, and readable on light and dark pages."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_COLOURS = ("#2f7fc1", "#d9622b", "#2a9d6f", "#a463c4", "#b8860b", "#c0396b")  # told apart by the colour-blind too
_INK, _GRID, _PAGE = "#20242b", "#c9ced6", "#fefefe"
_SIZE_INCHES = (7.2, 3.4)


@dataclass(frozen=True)
class Curve:
    """One line of a plot; `stderrs` are drawn as error bars of one standard error."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    stderrs: Sequence[float] | None = None
    style: str = "line"
    """line; dots: measured now and then, joined by a line; faint: noisy, in the background."""


@dataclass(frozen=True)
class Plot:
    """Curves over training steps, or bars where `bars` is given."""

    name: str
    """Short and unique on its page: a file name without suffix, and the prefix of its ids."""
    title: str
    y_label: str
    curves: tuple[Curve, ...] = ()
    bars: tuple[tuple[str, float], ...] = ()
    """(label, length), drawn from the top."""
    x_label: str = "step"

    def describe(self) -> str:
        """The plot in words, for those who cannot see it."""
        told = [f"{label} {length:,.1f}" for label, length in self.bars]
        for curve in self.curves:
            ends = f"from {curve.values[0]:.4g} to {curve.values[-1]:.4g} at {self.x_label} {curve.steps[-1]:,.0f}"
            told.append(f"{curve.label} {ends}")
        return f"{self.title}: {'; '.join(told)}"


def render_svg(plot: Plot, *, themed: bool = False) -> str:
    """The plot as an `<svg>` element, the same for the same numbers.

    themed: for a page that sets --ink, --grid and --page, whose colours it takes; else dark ink on white.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {  # not its type: matplotlib lists every name there is
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": plot.name,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": _PAGE,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": _GRID,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
    }
    with rc_context(settings):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained", facecolor=_PAGE)
        axes = figure.add_subplot()
        axes.set_title(plot.title, loc="left", fontsize=11)
        if plot.bars:
            _draw_bars(axes, plot)
        else:
            _draw_curves(axes, plot)
        written = io.StringIO()
        FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None, "Creator": None})
    return _finish(written.getvalue(), plot, themed)


def _draw_curves(axes: Any, plot: Plot) -> None:
    for curve, colour in zip(plot.curves, _COLOURS * len(plot.curves), strict=False):
        marker = "." if curve.style == "dots" or len(curve.steps) == 1 else ""
        faint = curve.style == "faint"
        axes.errorbar(
            curve.steps,
            curve.values,
            yerr=curve.stderrs,
            label=curve.label,
            color=colour,
            marker=marker,
            markersize=7,
            linewidth=1.0 if faint else 1.8,
            alpha=0.6 if faint else 1.0,
            capsize=3,
        )
    axes.grid(True)
    axes.set_axisbelow(True)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.ticklabel_format(useOffset=False)
    if len(plot.curves) > 1:
        axes.legend()


def _draw_bars(axes: Any, plot: Plot) -> None:
    labels, lengths = zip(*plot.bars, strict=True)
    # By position, so that two bars of one label stay two.
    drawn = axes.barh(range(len(labels)), lengths, color=_COLOURS[0], height=0.6)
    axes.set_yticks(range(len(labels)), labels)
    axes.bar_label(drawn, labels=[f" {length:,.1f}" for length in lengths], color=_INK)
    axes.invert_yaxis()
    axes.set_xlabel(plot.y_label)
    axes.margins(x=0.12)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _finish(svg: str, plot: Plot, themed: bool) -> str:
    """Without prologue, with ids that no other plot of the page has, scaled to its place, and told in words."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: '[^;]*?sans-serif;?", "", svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{plot.name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{plot.name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{plot.name}-\1)", svg)
    looks = 'font-family="system-ui, DejaVu Sans, sans-serif" stroke-linejoin="round"'
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(plot.describe())}" {looks} ', 1)
    if themed:
        for colour, variable in ((_INK, "--ink"), (_GRID, "--grid"), (_PAGE, "--page")):
            svg = svg.replace(colour, f"var({variable})")
    return svg.strip() + "\n"
