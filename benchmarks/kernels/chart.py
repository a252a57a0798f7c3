"""A bar chart of times as SVG, without a plotting library."""

from html import escape
from typing import Any

_WIDTH, _LEFT, _ROW, _BAR = 760, 250, 46, 16


def chart(rows: list[dict[str, Any]], title: str) -> str:
    """Ours and the obvious way side by side, each pair relative to its slower one.

    Args:
        rows: with `name`, `B`, `ours_seconds` and `eager_seconds`.
        title: above the chart.

    Returns:
        The text of an SVG file.
    """
    height = 50 + _ROW * len(rows)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="20" font-size="14">{escape(title)}: fused (dark), eager (light), ms</text>',
    ]
    for number, row in enumerate(rows):
        top = 40 + _ROW * number
        slower = max(row["ours_seconds"], row["eager_seconds"])
        lines.append(f'<text x="8" y="{top + 20}">{escape(row["name"])}, B = {row["B"]}</text>')
        for place, (key, colour) in enumerate((("ours_seconds", "#1b4965"), ("eager_seconds", "#bcd4e6"))):
            length = (_WIDTH - _LEFT - 90) * row[key] / slower
            y = top + place * (_BAR + 2)
            lines.append(f'<rect x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_BAR}" fill="{colour}"/>')
            lines.append(f'<text x="{_LEFT + length + 6:.1f}" y="{y + 13}">{row[key] * 1e3:.3f}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"
