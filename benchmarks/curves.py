"""Curves as a self-contained SVG: no plotting library is needed to look at results."""

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 960, 420, 60, 40, 30
LEGEND = 330
COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#edae49", "#7b4fa3", "#00798c", "#8d6a4f", "#555555")


def svg(curves: Mapping[str, Sequence[float]], *, title: str) -> str:
    """Returns a picture of `curves`, which start at the same step, on one pair of axes with a legend."""
    longest = max(map(len, curves.values()))
    values = [value for curve in curves.values() for value in curve]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    right = WIDTH - LEGEND

    def place(step: int, value: float) -> str:
        x = LEFT + (right - LEFT) * step / max(longest - 1, 1)
        y = TOP + (HEIGHT - BOTTOM - TOP) * (high - value) / span
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>',
    ]
    for tick in range(5):
        value = low + span * tick / 4
        y = place(0, value).split(",")[1]
        parts.append(f'<line x1="{LEFT}" y1="{y}" x2="{right}" y2="{y}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" text-anchor="end">{value:.3g}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 14}">0</text>')
    parts.append(f'<text x="{right}" y="{HEIGHT - 14}" text-anchor="end">{longest - 1} steps on</text>')
    for index, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        dash = ' stroke-dasharray="5 3"' if index >= len(COLOURS) else ""
        points = " ".join(place(step, value) for step, value in enumerate(curve))
        y = TOP + 16 * index + 10
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.4"{dash}/>')
        parts.append(f'<line x1="{right + 12}" y1="{y}" x2="{right + 36}" y2="{y}" stroke="{colour}"{dash}/>')
        parts.append(f'<text x="{right + 42}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])
