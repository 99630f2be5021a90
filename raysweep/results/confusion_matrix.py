"""A confusion matrix as an SVG picture, written as text: matplotlib's import takes most of a second."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from raysweep.errors import printable

CELL, MARGIN, LETTER = 34, 24, 6.5  # pixels: a cell, the space around, a letter of the labels
MAX_LABEL = 24  # letters of a class name; the rest is cut


def confusion_matrix_svg(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Returns a picture of counts: one row per true class, one column per predicted class.

    The shade is the share of the true class. Cells that count nothing stay empty, so that many classes fit.

    Args:
        labels: class names.
        counts: counts `(num_classes, num_classes)`.
    """
    shown = map(printable, labels)
    names = [name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL - 1]}…" for name in shown]
    left = MARGIN + LETTER * max(map(len, names), default=0) + 20
    size = CELL * len(names)
    width, height = left + size + MARGIN, left + size + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="sans-serif" font-size="11">',
        "<title>Confusion matrix: rows are true classes, columns predicted ones</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fff"/>',
        f'<text x="{left:.0f}" y="14" font-weight="bold">predicted</text>',
        f'<text x="4" y="{left - 6:.0f}" font-weight="bold">true</text>',
        f'<rect x="{left:.0f}" y="{left:.0f}" width="{size}" height="{size}" fill="none" stroke="#bbb"/>',
    ]
    for place, name in enumerate(names):
        middle = left + CELL * place + CELL / 2
        parts.append(f'<text x="{left - 6:.1f}" y="{middle + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        turned = f'transform="translate({middle + 4:.1f} {left - 6:.1f}) rotate(-90)"'
        parts.append(f"<text {turned}>{escape(name)}</text>")
    for row, values in enumerate(counts):
        total = sum(values)
        parts += [_cell(left, row, column, count, total) for column, count in enumerate(values) if count]
    return "\n".join([*parts, "</svg>"])


def _cell(left: float, row: int, column: int, count: int, total: int) -> str:
    share = count / total
    color = "#1f5f99" if row == column else "#b3401f"
    x, y, ink = left + CELL * column, left + CELL * row, "#fff" if share > 0.5 else "#000"
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{CELL}" height="{CELL}" fill="{color}" fill-opacity="{share:.3f}"/>'
        f'<text x="{x + CELL / 2:.1f}" y="{y + CELL / 2 + 4:.1f}" text-anchor="middle" fill="{ink}">{count}</text>'
    )
