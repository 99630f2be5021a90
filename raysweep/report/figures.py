"""Figures as SVG that takes its colours and its font from the page, so that light and dark need only one of each."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from raysweep.report.class_figures import CalibrationBins
from raysweep.results.leaderboard import Row
from raysweep.results.sweep_record import TrialRecord

# Stand-ins that no colour map has; `_to_svg` replaces them by the page's own colours.
INK, MUTED, ACCENT, GRID, SURFACE, GOOD = "#010203", "#020304", "#030405", "#040506", "#050607", "#060708"
_VARIABLES = {INK: "ink", MUTED: "muted", ACCENT: "accent", GRID: "grid", SURFACE: "surface", GOOD: "good"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, found and copied
    "text.parse_math": False,
    "font.size": 10.5,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip
SIZE = (4.9, 3.3)  # inches of 72 points: near the width of a phone, so that its text keeps its size there
# From blue to orange, in the middle of the scale of lightness: each end is seen on white and on black.
_SCALE = LinearSegmentedColormap.from_list("scale", ["#5b6ee1", "#8a7fd0", "#c77aa0", "#e8835c", "#f2a33a"])


def _new() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def _to_svg(figure: Figure, key: str) -> str:
    """Returns the SVG element. `key` keeps the ids of one figure apart from those of the others on the page."""
    text = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": key}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    for stand_in, name in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r'(id="|href="#|url\(#)', lambda match: f"{match.group(1)}{key}-", svg)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def draw_front(rows: Mapping[int, Row], costs: Sequence[float], label: str, key: str) -> str:
    """Draws accuracy against a cost: rows by their place in the table, and the line of those that none beats."""
    with mpl.rc_context(_STYLE):
        figure, axes = _new()
        lines = sorted(zip(costs, rows, strict=True), reverse=True)  # the cheapest, and the first of a tie, on top
        front: list[int] = []
        for _, place in lines[::-1]:
            if not front or rows[place].test_accuracy > rows[front[-1]].test_accuracy:
                front.append(place)
        cost_of = dict(zip(rows, costs, strict=True))
        accuracies = [rows[place].test_accuracy for place in front]
        axes.plot([cost_of[place] for place in front], accuracies, color=ACCENT, lw=1.2, ls=(0, (4, 3)))
        for cost, place in lines:
            row = rows[place]
            colour = GOOD if row.is_recommended else ACCENT if place in front else MUTED
            axes.errorbar(
                cost, row.test_accuracy, yerr=_intervals([row]), fmt="none", ecolor=colour, elinewidth=1.1, alpha=0.55
            )
            axes.plot(cost, row.test_accuracy, "o", ms=13, mfc=colour, mec=SURFACE, mew=1.5)
            middle: dict[str, Any] = {
                "ha": "center",
                "va": "center_baseline",
                "color": SURFACE,
                "size": 8.5,
                "weight": "bold",
            }
            axes.annotate(str(place), (cost, row.test_accuracy), **middle)
        _log_axis(axes, costs)
        axes.set_xlabel(label)
        axes.set_ylabel("test accuracy")
        axes.margins(0.09)
    return _to_svg(figure, key)


def _intervals(rows: Sequence[Row]) -> np.ndarray:
    """Returns how far the intervals reach below and above the accuracies, `(2, num_rows)`."""
    reach = [(row.test_accuracy - row.test_accuracy_low, row.test_accuracy_high - row.test_accuracy) for row in rows]
    return np.maximum(0, reach).T  # the last digits of an accuracy of 1 may lie above its interval


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Makes the horizontal axis logarithmic, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = min(values), max(values)
    axes.set_xscale("log")
    if high < 3 * low:  # else there might be no tick at all
        middle = (low * high) ** 0.5
        axes.set_xlim(min(low / 1.15, middle / 2), max(high * 1.15, middle * 2))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 60 * low else (1,)))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _place: f"{value:,.4g}" if value >= 1e-3 else f"{value:.0e}")
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator() if high < 60 * low else LogLocator(subs=(2, 5)))


def draw_response(trials: Sequence[TrialRecord], best: TrialRecord, metric: str, key: str) -> str:
    """Draws every trial: learning rate against epochs, or against the metric if all have as many epochs."""
    from matplotlib.ticker import MaxNLocator

    shown = [trial for trial in trials if metric in trial.metrics and trial.state != "failed"]
    values = [trial.metrics[metric] for trial in shown]
    rates = [float(trial.setting["learning_rate"]) for trial in shown]
    epochs = [int(trial.setting.get("epochs", 0)) for trial in shown]
    has_epochs = len(set(epochs)) > 1
    heights = [float(epoch) for epoch in epochs] if has_epochs else values
    with mpl.rc_context(_STYLE):
        figure, axes = _new()
        styles: dict[str, Any] = {"c": values, "cmap": _SCALE} if has_epochs else {"color": ACCENT}
        points = axes.scatter(rates, heights, s=44, linewidths=0.8, edgecolors=SURFACE, **styles)
        chosen = next((place for place, trial in enumerate(shown) if trial.number == best.number), None)
        if chosen is not None:
            axes.scatter([rates[chosen]], [heights[chosen]], s=150, facecolors="none", edgecolors=INK, linewidths=1.6)
        _log_axis(axes, rates)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("epochs" if has_epochs else metric)
        if has_epochs:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            bar = figure.colorbar(points, ax=axes, label=metric, pad=0.02, aspect=28)
            bar.outline.set_visible(False)
        axes.margins(0.06)
    return _to_svg(figure, key)


def draw_curves(trials: Sequence[TrialRecord], best: TrialRecord, metric: str, key: str) -> str:
    """Draws the metric of every trial after each epoch, the chosen trial on top, its chosen epoch marked."""
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context(_STYLE):
        figure, axes = _new()
        for trial in trials:
            curve = trial.history.get(metric, ())
            if trial.number != best.number and len(curve):
                style: dict[str, Any] = {"marker": "o", "ms": 3} if len(curve) == 1 else {}
                axes.plot(np.arange(1, len(curve) + 1), curve, color=MUTED, lw=0.9, alpha=0.35, **style)
        curve = best.history.get(metric, ())
        axes.plot(np.arange(1, len(curve) + 1), curve, color=ACCENT, lw=2)
        place = best.best_epoch if best.best_epoch >= 0 else len(curve) - 1
        if 0 <= place < len(curve):
            axes.plot(place + 1, curve[place], "o", ms=8, mfc=ACCENT, mec=SURFACE, mew=1.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel(metric)
    return _to_svg(figure, key)


def draw_few_shots(curves: Mapping[str, Sequence[Row]], key: str) -> str:
    """Draws accuracy by images a class, one line with its 95 % intervals for each name in the legend."""
    marks = ("o", "s", "^", "D", "v", "P", "X", "*")
    dashes = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
    colours = (ACCENT, GOOD, INK, MUTED)
    with mpl.rc_context(_STYLE):
        figure, axes = _new()
        for number, (name, rows) in enumerate(curves.items()):
            shots = [int(row.shots) for row in rows]
            middle = [row.test_accuracy for row in rows]
            style: dict[str, Any] = {"color": colours[number % 4], "ls": dashes[number // 4 % 4]}
            axes.errorbar(
                shots,
                middle,
                _intervals(rows),
                label=name,
                marker=marks[number % 8],
                ms=5,
                lw=1.4,
                elinewidth=0.9,
                **style,
            )
        _log_axis(axes, [int(row.shots) for rows in curves.values() for row in rows])
        axes.set_xlabel("training images a class")
        axes.set_ylabel("test accuracy")
        figure.legend(fontsize=8.5, frameon=False, loc="outside lower center", ncols=2)
    return _to_svg(figure, key)


def draw_calibration(bins: CalibrationBins, key: str) -> str:
    """Draws accuracy against confidence; the area of a point is the number of its images."""
    with mpl.rc_context(_STYLE):
        figure, axes = _new()
        axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 3)))
        sizes = 24 + 300 * bins.counts / bins.counts.sum()
        axes.scatter(bins.confidence, bins.accuracy, s=sizes, color=ACCENT, edgecolors=SURFACE, linewidths=1, zorder=3)
        axes.set_xlim(min(0.98, float(bins.confidence.min())) - 0.05, 1.03)
        axes.set_ylim(-0.03, 1.05)
        axes.set_xlabel("confidence of the prediction")
        axes.set_ylabel("share that is right")
    return _to_svg(figure, key)


def draw_confusion(counts: np.ndarray, key: str) -> str:
    """Draws shares of each true class as a picture: for more classes than a table can show."""
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        figure, axes = _new()
        picture = axes.imshow(shares, cmap=_SCALE, vmin=0, vmax=1, interpolation="nearest", alpha=np.sqrt(shares))
        axes.set_xlabel("predicted class, number")
        axes.set_ylabel("true class, number")
        bar = figure.colorbar(picture, ax=axes, label="share of the true class", pad=0.02, aspect=28)
        bar.outline.set_visible(False)
    return _to_svg(figure, key)
