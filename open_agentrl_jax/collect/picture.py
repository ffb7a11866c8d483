"""A bar chart as SVG text: nothing to install, and it reads in a browser and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#9aa5b1", "#1f77b4", "#2ca02c", "#d62728")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640, 280, 48, 56, 40


def bars(title: str, labels: Sequence[str], series: Mapping[str, Sequence[int]]) -> str:
    """Groups of bars, one a label, each with one bar a series and its number on top.

    Args:
        title: above all.
        labels: [n] under the groups.
        series: name -> [n] counts.
    """
    top = max((max(values, default=0) for values in series.values()), default=0) or 1
    group = (WIDTH - LEFT) / max(1, len(labels))
    width = 0.8 * group / max(1, len(series))
    floor = HEIGHT - BOTTOM
    parts = [f'<text x="{LEFT}" y="18" font-size="15">{escape(title)}</text>']
    for s, (name, values) in enumerate(series.items()):
        colour, place = COLOURS[s % len(COLOURS)], LEFT + 130 * s
        parts.append(f'<rect x="{place}" y="28" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{place + 18}" y="39">{escape(name)} ({sum(values)})</text>')
        for i, value in enumerate(values):
            height = (floor - TOP - 14) * value / top
            x = LEFT + group * i + 0.1 * group + width * s
            parts.append(
                f'<rect x="{x:.1f}" y="{floor - height:.1f}" width="{width:.1f}" height="{height:.1f}" '
                f'fill="{colour}"/>'
                f'<text x="{x + width / 2:.1f}" y="{floor - height - 4:.1f}" text-anchor="middle">{value}</text>'
            )
    for i, label in enumerate(labels):
        x = LEFT + group * (i + 0.5)
        parts.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{escape(label)}</text>')
    parts.append(f'<line x1="{LEFT}" y1="{floor}" x2="{WIDTH}" y2="{floor}" stroke="#333"/>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )
