"""The pictures of a report, drawn by matplotlib as SVG that takes its colours from the page.

Each picture is drawn in stand-in colours, which become CSS variables, so that light, dark and print need one drawing.
Every mark that differs in colour differs in shape too.
"""

from __future__ import annotations

import html
import io
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from ksl_patch.patch.evaluation import METRICS
from ksl_patch.patch.evaluation import Figure as Score
from ksl_patch.patch.wording import show

_INK, _GRID, _ACCENT, _OTHER = "#010203", "#040506", "#070809", "#0a0b0c"
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--grid)", _ACCENT: "var(--accent)", _OTHER: "var(--other)"}
_PLOTTED = (
    "loss",
    "chrf_first_line",
    "chrf",
    "bleu_first_line",
    "stop_rate",
    "in_language",
    "characters",
    "touched",
    "other_loss",
    "other_same",
)
_CLOUD = "#888888"  # the points that are a picture inside the picture: seen on light and dark
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ksl_patch",
    "text.parse_math": False,  # a token may be a dollar sign
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
}


@dataclass(frozen=True)
class Picture:
    """svg: to put into a page, with its title and its description, the text alternative, inside."""

    svg: str
    title: str
    description: str


@dataclass(frozen=True)
class Dot:
    """A line of a dot plot: a label, a score, and which of the kinds "patch", "reference" or "control" it is."""

    label: str
    score: Score
    kind: str


@matplotlib.rc_context(_STYLE)
def histogram(name: str, token: str, before: np.ndarray, after: np.ndarray, statistic: float | None) -> Picture:
    """The distribution of a row's values before and after. name: unique on the page. before, after: float [d]."""
    figure, axes = _new(2.6, 1.7)
    edges = np.histogram_bin_edges(np.concatenate([before, after]), bins=24)
    axes.hist(before, bins=edges, color=_OTHER, alpha=0.35)
    axes.hist(after, bins=edges, histtype="step", linewidth=1.6, color=_ACCENT)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    D = "" if statistic is None else f", D {statistic:.3f}"
    text = (
        f"The {len(before)} values of the row of token {token}: mean {before.mean():.3g} and standard deviation "
        f"{before.std():.3g} in the base, {after.mean():.3g} and {after.std():.3g} in the patch{D}."
    )
    return _picture(figure, name, f"Values of the row of {token}{D}", text)


@matplotlib.rc_context(_STYLE)
def volcano(
    name: str,
    counts: np.ndarray,
    statistic: np.ndarray,
    ticket: np.ndarray,
    tokens: Sequence[str],
    critical: tuple[float, float] | None,
) -> Picture:
    """Every trained row: D against how often the embedding tuning read its token.

    counts, statistic: [V]. ticket: ids [k], tokens: their texts. critical: the level alpha and the D from which p is
    below it.
    """
    figure, axes = _new(6.4, 3.8)
    top = float(statistic.max())
    others = np.setdiff1d(np.flatnonzero((counts > 0) | (statistic > 0)), ticket)
    axes.scatter(
        np.maximum(counts[others], 0.7), statistic[others], s=5, color=_CLOUD, alpha=0.5, linewidths=0, rasterized=True
    )
    axes.scatter(
        np.maximum(counts[ticket], 0.7), statistic[ticket], s=26, marker="D", facecolors="none", edgecolors=_ACCENT,
        linewidths=1.2,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("times the embedding tuning read the token")
    axes.set_ylabel("D, before against after")
    axes.grid(axis="y", linewidth=0.5)
    if critical is not None:
        alpha, value = critical
        axes.axhline(value, color=_OTHER, linewidth=1, linestyle="--")
        axes.annotate(
            f"p = {alpha:g}", (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=_OTHER
        )
    named: list[tuple[float, float]] = []
    for place in np.argsort(-statistic[ticket], kind="stable"):
        point = (float(np.log10(max(counts[ticket[place]], 0.7))), float(statistic[ticket[place]]))
        # A name that would lie on another is left out: the table has them all.
        if len(named) < 12 and all(abs(point[0] - x) > 0.45 or abs(point[1] - y) > 0.06 * top for x, y in named):
            named.append(point)
            axes.annotate(
                _shown(tokens[place]), (10 ** point[0], point[1]), xytext=(5, 3), textcoords="offset points"
            )  # fmt: skip
    above = "" if critical is None else f" {int((statistic >= critical[1]).sum())} rows have p < {critical[0]:g}."
    text = (
        f"{len(others) + len(ticket)} rows as points, the {len(ticket)} of the patch as diamonds. The largest D is "
        f"{top:.3f}.{above} The tuning read the patch's tokens {int(np.median(counts[ticket]))} times at the median, "
        f"the others {int(np.median(counts[others])) if len(others) else 0} times."
    )
    return _picture(figure, name, "All trained rows: how far each moved, and how frequent its token is", text)


@matplotlib.rc_context(_STYLE)
def dot_plot(name: str, metric: str, dots: Sequence[Dot]) -> Picture:
    """The difference of every system from the base in one metric, with its interval. dots: from the top down."""
    label, _, more_is_better = METRICS[metric]
    figure, axes = _new(4.0, 0.75 + 0.27 * len(dots))
    sentences = []
    for y, dot in enumerate(dots):
        score = dot.score
        difference = score.difference or 0.0
        colour = {"patch": _ACCENT, "reference": _INK, "control": _OTHER}[dot.kind]
        if score.low is not None and score.high is not None:
            axes.plot([score.low, score.high], [y, y], color=colour, linewidth=1.4)
        marker = {"patch": "o", "reference": "s", "control": "D"}[dot.kind]
        filled = colour if dot.kind == "patch" else "none"
        axes.plot([difference], [y], marker, markersize=6, markerfacecolor=filled, markeredgecolor=colour)
        interval = "" if score.low is None else f" ({show(metric, score.low)} to {show(metric, score.high or 0)})"
        sentences.append(f"{dot.label}: {show(metric, difference)}{interval}")
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set_yticks(range(len(dots)), [dot.label for dot in dots])
    axes.set_ylim(len(dots) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", linewidth=0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if METRICS[metric][1].endswith("%"):
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    better = {True: " (right is better)", False: " (left is better)", None: ""}[more_is_better]
    return _picture(
        figure,
        name,
        f"{label}, difference from the base{better}",
        f"Differences from the base. {'; '.join(sentences)}.",
    )


def quoted(token: str) -> str:
    """A token as text that shows its spaces and control characters."""
    return json.dumps(token, ensure_ascii=False)


def _shown(token: str) -> str:
    return token.strip() if token.strip().isprintable() and token.strip() else quoted(token)


def _new(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _picture(figure: Figure, name: str, title: str, description: str) -> Picture:
    content = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the page's fonts draw the glyphs that matplotlib's lacks
        figure.savefig(content, format="svg", transparent=True, dpi=160, metadata={"Date": None, "Creator": None})
    svg = content.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Several drawings share a page: names inside each get its own.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    tag, body = re.findall(r"(<svg .*?>)(.*)", svg, flags=re.DOTALL)[0]
    width, height = (float(x) for x in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', tag)[0])
    head = (
        f'<svg role="img" aria-labelledby="{name}-title {name}-desc" viewBox="0 0 {width} {height}" '
        f'style="max-width: {width * 4 / 3:.0f}px">'
        f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-desc">{html.escape(description)}</desc>'
    )
    return Picture(head + body, title, description)


def dots(name: str, lines: Sequence[tuple[str, dict[str, Score], str]]) -> list[Picture]:
    """A dot plot of each metric. lines: label, figures and kind of what is compared with the base."""
    pictures = []
    for metric in _PLOTTED:
        found = [Dot(label, figures[metric], kind) for label, figures, kind in lines if metric in figures]
        if found:
            pictures.append(dot_plot(f"{name}-{metric}", metric, found))
    return pictures
