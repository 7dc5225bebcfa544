"""Small line charts as SVG, for pages that load nothing from elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#64748b")
WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 28


@dataclass(frozen=True)
class Line:
    """A series; low and high draw a band around it. smooth: points averaged into the bold line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    smooth: int = 1
    dots: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    rough = (high - low) / max(1, count - 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and the `width` - 1 before it."""
    return [
        sum(part) / len(part) for i in range(len(values)) for part in [values[max(0, i - width + 1) : i + 1]]
    ]


def label(value: float, step: float) -> str:
    """A tick as text, with as many digits as tell it from its neighbors."""
    if abs(value) < step / 2:
        return "0"
    if abs(value) >= 100_000 or step < 1e-4:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{digits + (f'{step:.9e}'[2] not in '0')}f}" if step < 10 else f"{value:.0f}"


def finite(line: Line) -> Line:
    """The points that have a value."""
    good = [i for i, y in enumerate(line.y) if y is not None and math.isfinite(y)]

    def keep(values: Sequence[float]) -> list[float]:
        return [values[i] for i in good] if values else []

    return Line(
        line.name, keep(line.x), keep(line.y), keep(line.low), keep(line.high), line.smooth, line.dots
    )


def chart(lines: Iterable[Line], floor: float | None = None) -> str:
    """An SVG of the lines over one x axis, with its legend; floor: the y axis reaches down to it."""
    lines = [line for line in map(finite, lines) if line.x]
    if not lines:
        return "<p class=none>nothing was measured</p>"
    drawn = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img>{"".join(drawing(lines, floor))}</svg>'
    return drawn + (legend([line.name for line in lines]) if len(lines) > 1 else "")


FIGURE_STYLE = """
text { font: 11px system-ui, sans-serif; fill: #52525b } .title { font-size: 13px; fill: #18181b }
.rule { stroke: #ececef; fill: none } .line { fill: none; stroke-width: 1.2 } .bold { stroke-width: 2 }
"""
HEAD, FOOT, ROW = 26, 22, 18  # heights of a figure's title, of the name of its x axis, and of a legend's row


def figure(lines: Iterable[Line], title: str, axis: str) -> str:
    """A chart as an SVG file of its own, with title, name of the x axis and legend in it."""
    lines = [line for line in map(finite, lines) if line.x]
    height = HEAD + HEIGHT + FOOT + ROW * -(-len(lines) // 3)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">',
        f'<style>{FIGURE_STYLE}</style><rect width="100%" height="100%" fill="#fff" />',
        f'<text x="{LEFT}" y="18" class="title">{html.escape(title)}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEAD + HEIGHT + 12}" text-anchor="end">{html.escape(axis)}</text>',
        f'<g transform="translate(0 {HEAD})">{"".join(drawing(lines, whole=False))}</g>',
    ]
    for i, line in enumerate(lines):
        x, y = LEFT + (i % 3) * (WIDTH - LEFT) // 3, HEAD + HEIGHT + FOOT + ROW * (i // 3)
        out.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{color(i)}" />')
        out.append(f'<text x="{x + 15}" y="{y + 9}">{html.escape(line.name)}</text>')
    return "".join(out) + "</svg>\n"


def color(place: int) -> str:
    return COLORS[place % len(COLORS)]


def drawing(lines: Sequence[Line], floor: float | None = None, whole: bool = True) -> list[str]:
    """Axes and lines of a chart, none of which may be empty; whole: x counts something."""
    if not lines:
        return []
    every = [y for line in lines for y in (*line.y, *line.low, *line.high) if math.isfinite(y)]
    bottom, top = min(every), max(every)
    if floor is not None:
        bottom = min(bottom, floor)
    if top - bottom <= 1e-12 * max(1.0, abs(top)):
        bottom, top = (bottom - abs(bottom) * 0.1, top + abs(top) * 0.1) if top else (0.0, 1.0)
    marks = ticks(bottom, top)
    bottom, top = marks[0], marks[-1]
    x0, x1 = min(min(line.x) for line in lines), max(max(line.x) for line in lines)
    x1 = x1 if x1 > x0 else x0 + 1

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return TOP + (top - y) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    def path(xs: Sequence[float], ys: Sequence[float]) -> str:
        return "M" + "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in zip(xs, ys, strict=True))

    out = []
    for mark in marks:
        y = py(mark)
        out.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" class="rule" />')
        text = label(mark, marks[1] - marks[0])
        out.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    places = ticks(x0, x1, 6)
    for mark in places:
        if x0 <= mark <= x1 and (float(mark).is_integer() or not whole):
            below, text = HEIGHT - BOTTOM + 18, label(mark, places[1] - places[0])
            out.append(f'<text x="{px(mark):.1f}" y="{below}" text-anchor="middle">{text}</text>')
    for i, line in enumerate(lines):
        stroke = f'stroke="{color(i)}"'
        if line.low and line.high and len(line.x) == 1:
            x, ends = px(line.x[0]), (py(line.low[0]), py(line.high[0]))
            out.append(f'<path d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}" class="line" {stroke} />')
        elif line.low and line.high:
            around = path(line.x, line.high) + "L" + path(line.x[::-1], line.low[::-1])[1:] + "Z"
            out.append(f'<path d="{around}" fill="{color(i)}" opacity=".13" />')
        if line.smooth > 1:
            out.append(f'<path d="{path(line.x, line.y)}" class="line" {stroke} opacity=".25" />')
        bold = running_mean(line.y, line.smooth)
        out.append(f'<path d="{path(line.x, bold)}" class="line bold" {stroke} />')
        if line.dots or len(line.x) == 1:
            for x, y in zip(line.x, bold, strict=True):
                out.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3" fill="{color(i)}" />')
    return out


def bars(shares: Sequence[tuple[str, float]]) -> str:
    """Shares of a whole as one horizontal bar with its legend."""
    total = sum(value for _, value in shares) or 1.0
    x, out = 0.0, [f'<svg viewBox="0 0 {WIDTH} 26" role=img>']
    for i, (_, value) in enumerate(shares):
        width = value / total * WIDTH
        out.append(f'<rect x="{x:.1f}" y=3 width="{width:.1f}" height=20 fill="{color(i)}" />')
        x += width
    return "".join(out) + "</svg>" + legend([f"{name} {value / total:.1%}" for name, value in shares])


def legend(names: Sequence[str]) -> str:
    """A patch of color and a name for each line."""
    spans = [
        f'<span><i style="background:{color(i)}"></i>{html.escape(name)}</span>'
        for i, name in enumerate(names)
    ]
    return f"<div class=legend>{''.join(spans)}</div>"
