"""Panels of lines over time as one small SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 370, 190, 46, 12, 28, 44
COLOURS = ("#3274d9", "#e0752d", "#37872d", "#c4162a", "#8f3bb8", "#e0b400", "#00868c", "#757575")
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: above it.
        unit: Grafana's name of the unit.
        lines: name of each line to its points (seconds, value).
    """

    title: str
    unit: str
    lines: Mapping[str, Points]


def draw(panels: Sequence[Panel], num_columns: int, title: str) -> str:
    """Draw panels in rows.

    Args:
        panels: in reading order.
        num_columns: panels of a row.
        title: for readers that do not see it.
    """
    num_rows = -(-len(panels) // num_columns)
    width, height = WIDTH * num_columns, HEIGHT * num_rows
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="sans-serif" font-size="9">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for index, panel in enumerate(panels):
        x, y = WIDTH * (index % num_columns), HEIGHT * (index // num_columns)
        parts += [f'<g transform="translate({x} {y})">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> list[str]:
    points = [point for line in panel.lines.values() for point in line]
    start, end = min(time for time, _ in points), max(time for time, _ in points)
    top = max(1e-9, *(value for _, value in points)) * 1.05
    if panel.unit == "percentunit":
        top = max(top, 0.2)

    def place(time: float, value: float) -> tuple[float, float]:
        x = LEFT + (time - start) / max(end - start, 1) * (WIDTH - LEFT - RIGHT)
        return round(x, 1), round(HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<text x="8" y="16" font-size="11" font-weight="bold" fill="#222">{escape(panel.title)}</text>']
    for share in (0, 0.5, 1):
        _, y = place(start, share * top)
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        label = escape(_format(share * top, panel.unit))
        parts.append(f'<text x="{LEFT - 4}" y="{y + 3}" text-anchor="end" fill="#555">{label}</text>')
    for seconds in range(0, int(end - start) + 1, 30):
        x, y = place(start + seconds, 0)
        parts.append(f'<text x="{x}" y="{y + 11}" text-anchor="middle" fill="#555">{seconds} s</text>')
    x = 8.0
    y = HEIGHT - 19
    for index, (name, line) in enumerate(panel.lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = "L".join(f"{px} {py}" for px, py in (place(*point) for point in line))
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        length = 16 + 5.2 * len(name)
        if x + length > WIDTH - 4:
            x, y = 8.0, y + 11
        parts.append(f'<rect x="{x:.0f}" y="{y - 6}" width="8" height="3" fill="{colour}"/>')
        parts.append(f'<text x="{x + 11:.0f}" y="{y}" fill="#333">{escape(name)}</text>')
        x += length
    return parts


def _format(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{100 * value:.0f}%"
    if unit == "s":
        return f"{value:.2g} s" if value >= 0.1 or value == 0 else f"{1e3 * value:.2g} ms"
    ending = {"Bps": "B/s", "flops": "FLOP/s", "reqps": "/s", "ops": "/s"}.get(unit, "")
    for size, prefix in PREFIXES:
        if value >= size:
            return f"{value / size:.3g} {prefix}{ending}"
    return f"{value:.2g} {ending}".strip()
