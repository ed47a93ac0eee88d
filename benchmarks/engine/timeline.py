"""Draws what host and device did in some steps as an SVG picture, two lanes a case. Knows nothing about how it was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from benchmarks.engine.activity import Activity, Span

_WIDTH, _LEFT, _LANE, _CASE = 1200, 70, 26, 118
_DEVICE_COLOURS = ("#4472c4", "#c55a11", "#548235", "#7f3fa6", "#b8860b", "#2e8b8b", "#a0303e")
_OTHER, _HOST = "#9aa5b1", "#c9ced6"


def draw_timelines(cases: Mapping[str, Activity]) -> str:
    """One picture of all cases, each in its own scale, with the names of the device's longest work in their colours."""
    parts = [
        part for number, (title, case) in enumerate(cases.items()) for part in _case(title, case, top=number * _CASE)
    ]
    height = _CASE * len(cases)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 10}" height="{height}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _case(title: str, case: Activity, *, top: int) -> list[str]:
    begin, end = case.steps[0].start_us, case.steps[-1].end_us
    scale = _WIDTH / (end - begin)
    named = [name for name, _, _ in case.top_work(len(_DEVICE_COLOURS))]
    colours = dict(zip(named, _DEVICE_COLOURS, strict=False))
    head = f"{title}: {case.num_steps} steps, {case.wall_us / 1e3:.2f} ms, device idle {case.idle_share:.0%}"
    parts = [f'<text x="4" y="{top + 14}" font-weight="bold">{escape(head)}</text>']
    for lane, (label, spans, other) in enumerate((("device", case.device, _OTHER), ("host", case.host, _HOST))):
        y = top + 22 + lane * (_LANE + 4)
        parts.append(f'<text x="4" y="{y + 17}">{label}</text>')
        parts.extend(
            f'<rect x="{_LEFT + (at - begin) * scale:.1f}" y="{y}" width="{max(0.3, width * scale):.1f}" height="{_LANE}" fill="{colour}"/>'
            for at, width, colour in _drawn(spans, colours, other, pixel_us=1.0 / scale)
        )
    for step in case.steps:
        x = _LEFT + (step.start_us - begin) * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top + 20}" y2="{top + 80}" stroke="black"/>')
    x = 4
    for name, colour in colours.items():
        short = name if len(name) <= 24 else name[:23] + "…"
        parts.append(f'<rect x="{x}" y="{top + 88}" width="9" height="9" fill="{colour}"/>')
        parts.append(f'<text x="{x + 13}" y="{top + 97}">{escape(short)}</text>')
        x += 180
    return parts


def _drawn(
    spans: tuple[Span, ...], colours: Mapping[str, str], other: str, *, pixel_us: float
) -> list[tuple[float, float, str]]:
    """Rectangles (begin, width, colour): neighbours of one colour that are less than a pixel apart are one, so the picture stays small."""
    drawn: list[tuple[float, float, str]] = []
    for span in spans:
        colour = colours.get(span.name, other)
        if drawn:
            at, width, before = drawn[-1]
            if span.start_us - (at + width) < pixel_us and (colour == before or span.length_us < pixel_us):
                drawn[-1] = (at, max(width, span.end_us - at), before)
                continue
        drawn.append((span.start_us, span.length_us, colour))
    return drawn
