"""Two charts as SVG, to stand in a page of lib/page.py, whose style sheet has the colours."""
import html
import math
from typing import NamedTuple

import numpy as np

WIDTH, LEFT, RIGHT = 440, 40, 10  # of the drawing, in its own units: what is written is 12 high


class Line(NamedTuple):
    label: str
    points: list  # (x, y)
    look: str     # classes of the style sheet


def line_chart(title, lines, x_label, y_label, y_range):
    """Lines over one pair of axes, a legend below. Points above y_range are left out."""
    top, height = 24, 210
    y_ticks, x_ticks = ticks(*y_range, 5), ticks(0, max(x for line in lines for x, _ in line.points), 5)
    decimals = max(len(f"{y:g}".partition(".")[2]) for y in y_ticks)
    across = scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    up = scale(y_ticks[0], y_ticks[-1], top + height, top)
    parts = [text(0, 12, y_label, "label")]
    for y in y_ticks:
        parts += [stroke([(LEFT, up(y)), (WIDTH - RIGHT, up(y))], "grid"),
                  text(LEFT - 6, up(y) + 4, f"{y:.{decimals}f}", "tick end")]
    parts += [text(across(x), top + height + 16, f"{x:,.15g}", "tick middle") for x in x_ticks]
    parts.append(text(WIDTH - RIGHT, top + height + 32, x_label, "label end"))
    for line in lines:
        shown = [(across(x), up(y)) for x, y in line.points if y <= y_ticks[-1]]
        parts.append(stroke(shown, line.look))
        if "strong" in line.look:
            parts += [dot(x, y, line.look.split()[0]) for x, y in shown]
    for i, line in enumerate(lines):
        y = top + height + 50 + 18 * i
        parts += [stroke([(LEFT, y), (LEFT + 34, y)], line.look), text(LEFT + 44, y + 4, line.label)]
    return drawing(title, top + height + 46 + 18 * len(lines), parts)


def violins(title, rows, chance, x_label):
    """rows: (label, values in %). A row each: the distribution's shape, a point a value, the median's line;
    chance is a broken line."""
    across, high, parts = scale(0, 100, 8, WIDTH - RIGHT), 84, []
    bottom = high * len(rows) + 6
    for x in range(0, 101, 25):
        parts += [stroke([(across(x), 0), (across(x), bottom)], "grid"),
                  text(across(x), bottom + 16, f"{x}", "tick middle")]
    parts += [stroke([(across(chance), 0), (across(chance), bottom)], "chance"),
              text(WIDTH - RIGHT, bottom + 32, x_label, "label end")]
    for i, (label, values) in enumerate(rows):
        middle, look = high * i + 52, f"c{i % 6 + 1}"
        x, width = density(values)
        half = 26 * width / width.max()
        outline = [*zip(x, middle - half), *zip(x[::-1], middle + half[::-1])]
        parts.append(stroke([(across(a), b) for a, b in outline], f"{look} body", closed=True))
        parts += [dot(across(v), middle, look) for v in values]
        median = across(np.median(values))
        parts += [stroke([(median, middle - 30), (median, middle + 30)], f"{look} strong"),
                  text(8, middle - 33, label)]
    return drawing(title, bottom + 38, parts)


def density(values):
    """A Gaussian at each of n values, of the width std n^(-1/5) (Scott; at least 0.5): 80 places from the
    least value to the greatest, and the density there."""
    values = np.asarray(values, float)
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    width = max(deviation * len(values) ** -0.2, 0.5)
    x = np.linspace(values.min(), values.max(), 80)
    kernels = np.exp(-0.5 * ((x[:, None] - values) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    return x, kernels.mean(1)


def ticks(low, high, n):
    """About n round numbers, a step apart, from below `low` to above `high`."""
    rough = max(high - low, 1e-9) / n
    power = 10 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [round(step * i, 10) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def scale(low, high, start, end):
    return lambda value: start + (value - low) / (high - low or 1) * (end - start)


def stroke(points, look, closed=False):
    path = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{look}" d="M{path}{"Z" * closed}"/>' if points else ""


def dot(x, y, look):
    return f'<circle class="{look}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'


def text(x, y, content, look=""):
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}">{html.escape(content)}</text>'


def drawing(title, height, parts):
    return (f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">\n<title>{html.escape(title)}</title>\n'
            + "\n".join(parts) + "\n</svg>")
