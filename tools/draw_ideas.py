#!/usr/bin/env python3
"""Draw StageInteractor's two ideas as one picture: docs/images/ideas.svg.

    python tools/draw_ideas.py            # after this file has changed
    python tools/draw_ideas.py --check    # fails where the picture is not this file's

What it shows is what docs/method.md says: which stages reuse whose filters, and which labels a
query gets at each stage of an example.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "ideas.svg"
WIDTH, HEIGHT = 1080, 716
CENTERS = (170, 420, 670, 920)  # x of the stages
BLUE, GREEN, RED, GREY, DARK = "#0b5cad", "#14783c", "#b3261e", "#6b7280", "#1f2937"
THUMBNAIL, STAR = (100, 70), 26  # width and height; radius of the star in its middle
# Of the example's query: its box in the thumbnail (x, y, width, height), and whether the stage
# itself matches it to the star. Whether it learns the label follows.
EXAMPLE = (
    ((2, 22, 62, 46), False),
    ((16, 4, 58, 62), True),
    ((20, 4, 58, 55), False),
    ((25, 9, 51, 50), True),
)
MARKERS = "".join(
    f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
    f'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{color}"/></marker>'
    for name, color in (("blue", BLUE), ("green", GREEN), ("grey", GREY), ("red", RED))
)


def text(
    x: float, y: float, content: str, *, size=15, color=DARK, anchor="middle", bold=False
) -> str:
    """Lines of text; the first one's base line is at y."""
    weight = ' font-weight="600"' if bold else ""
    lines = "".join(
        f'<tspan x="{x}" y="{y + 1.35 * size * i:g}">{escape(line)}</tspan>'
        for i, line in enumerate(content.split("\n"))
    )
    return f'<text font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>{lines}</text>'


def box(x, y, width, height, *, fill="white", stroke=GREY, dashed=False, radius=8) -> str:
    """A rounded frame."""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="1.5"{dash}/>'
    )


def arrow(path: str, color: str, *, dashed=False) -> str:
    """A curve with a head, in the colour of a marker."""
    name = {BLUE: "blue", GREEN: "green", GREY: "grey", RED: "red"}[color]
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2" '
        f'marker-end="url(#{name})"{dash}/>'
    )


def star(x: float, y: float, radius: float) -> str:
    """A star of five points."""
    corners = []
    for i in range(10):
        angle, length = math.pi * (i / 5 - 0.5), radius * (1 if i % 2 == 0 else 0.45)
        corners.append(f"{x + length * math.cos(angle):.1f},{y + length * math.sin(angle):.1f}")
    return f'<polygon points="{" ".join(corners)}" fill="#f2b134"/>'


def iou_with_star(frame: tuple[int, int, int, int]) -> float:
    """Of a box in the thumbnail with the smallest one around the star."""
    x, y = THUMBNAIL[0] / 2, THUMBNAIL[1] / 2
    half, low = STAR * math.sin(0.4 * math.pi), STAR * math.cos(0.2 * math.pi)
    left, top, right, bottom = x - half, y - STAR, x + half, y + low
    across = min(right, frame[0] + frame[2]) - max(left, frame[0])
    down = min(bottom, frame[1] + frame[3]) - max(top, frame[1])
    inside = max(0.0, across) * max(0.0, down)
    return inside / (frame[2] * frame[3] + (right - left) * (bottom - top) - inside)


def learns_star(stage: int) -> bool:
    """Whether it, the stage before, or a later one is matched, and its box is good enough."""
    matched = any(is_matched for _, is_matched in EXAMPLE[max(0, stage - 1) :])
    return matched and iou_with_star(EXAMPLE[stage][0]) >= 0.5


def draw_bank() -> list[str]:
    """The first idea, above the stages."""
    parts = [
        text(40, 44, "1  Filters are reused across stages", size=20, color=BLUE, anchor="start"),
        text(
            40,
            72,
            "Each stage makes filters from its query and mixes the sampled features with them. "
            "From stage 2 on it leaves them in a\nbank: later stages take them out, adapt them to "
            "the query by gates, and mix with them, too.",
            color=DARK,
            anchor="start",
        ),
        box(40, 118, 1000, 50, fill="#e8f1fb", stroke=BLUE),
        text(CENTERS[0], 149, "filter bank", color=BLUE, bold=True),
    ]
    for source in (1, 2):
        x = CENTERS[source]
        parts += [
            box(x - 75, 126, 150, 34, stroke=BLUE),
            text(x, 148, f"filters of stage {source + 1}", color=BLUE, size=14),
            arrow(f"M{x - 40} 238L{x - 40} 163", BLUE),
        ]
    for source, target, shift in ((1, 2, 10), (1, 3, -8), (2, 3, 30)):
        start, end = CENTERS[source] + 62, CENTERS[target] + shift
        parts.append(arrow(f"M{start} 160C{start + 30} 205,{end} 185,{end} 236", BLUE))
    parts.append(text(CENTERS[3] + 48, 208, "reused", color=BLUE, size=14, anchor="start"))
    return parts


def draw_stages() -> list[str]:
    """The cascade."""
    parts = [text(14, 335, "query", anchor="start", color=GREY, size=14)]
    for t, (x, ((left, top, width, height), _)) in enumerate(zip(CENTERS, EXAMPLE)):
        parts += [
            box(x - 80, 240, 160, 152, fill="#f8fafc", stroke=DARK),
            text(x, 264, f"Stage {t + 1}", bold=True, size=16),
            box(x - 50, 274, *THUMBNAIL, fill="#e5e7eb", stroke="none", radius=2),
            star(x, 274 + THUMBNAIL[1] / 2, STAR),
            f'<rect x="{x - 50 + left}" y="{274 + top}" width="{width}" height="{height}" '
            f'fill="none" stroke="{RED}" stroke-width="2.5"/>',
            text(x, 364, "attend, sample, mix:", size=13, color=GREY),
            text(x, 381, "new class and box", size=13, color=GREY),
        ]
        begin = CENTERS[t - 1] + 82 if t else 58
        parts.append(arrow(f"M{begin} 330L{x - 83} 330", GREY))
    parts.append(arrow(f"M{CENTERS[-1] + 82} 330L{WIDTH - 30} 330", GREY))
    return parts


def draw_labels() -> list[str]:
    """The second idea, below the stages."""
    parts = [
        text(
            40,
            436,
            "2  Labels are assigned across stages, in training",
            size=20,
            color=GREEN,
            anchor="start",
        )
    ]
    for y, words in ((468, "own match"), (524, "IoU of its box"), (586, "label it learns")):
        parts.append(text(18, y, words.replace(" ", "\n", 1), size=13, color=GREY, anchor="start"))
    for t, (x, (frame, matched)) in enumerate(zip(CENTERS, EXAMPLE)):
        iou, learns = iou_with_star(frame), learns_star(t)
        color = GREEN if learns else GREY
        is_new = learns and not matched
        parts += [
            box(x - 58, 456, 116, 32, stroke=GREEN if matched else GREY, dashed=not matched),
            text(x, 477, "star" if matched else "background", color=DARK if matched else GREY),
            text(x, 536, f"{iou:.2f}", color=DARK if iou >= 0.5 else RED),
            box(x - 58, 576, 116, 32, fill="#dff3e4" if learns else "white", stroke=color),
            text(x, 597, "star" if learns else "background", color=color, bold=is_new),
        ]
        if matched:
            parts.append(arrow(f"M{x - 34} 490L{x - 34} 573", GREEN))
    x1, x2, x3, x4 = CENTERS
    parts += [
        arrow(f"M{x2 + 40} 490C{x2 + 60} 560,{x3 - 110} 540,{x3 - 40} 573", GREEN),
        arrow(f"M{x4 - 48} 490C{x4 - 70} 560,{x3 + 120} 540,{x3 + 44} 573", GREEN),
        arrow(f"M{x2 - 48} 490C{x2 - 70} 560,{x1 + 120} 540,{x1 + 62} 580", RED, dashed=True),
        text((x1 + x2) / 2 - 10, 524, "box too far off:\nno label", size=13, color=RED),
        text(
            40,
            642,
            "Where a query's box covers an object well enough (IoU 0.5 or more), it learns the "
            "object's class, even if the stage itself\nmatched the query to nothing: the stage "
            "before or a later one did. Stage 3 is told “star” as well; with each stage's\nown "
            "match it would be told “background” for a box that lies on the star.",
            anchor="start",
        ),
    ]
    return parts


def draw() -> str:
    """The picture."""
    parts = [*draw_bank(), *draw_stages(), *draw_labels()]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="system-ui, Segoe UI, Helvetica, Arial, '
        'sans-serif" role="img">\n<title>Filters are reused, and labels are assigned, across the '
        f'stages of a cascade</title>\n<defs>{MARKERS}</defs>\n<rect width="{WIDTH}" '
        f'height="{HEIGHT}" rx="10" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args(argv)
    picture = draw()
    if not args.check:
        PICTURE.write_text(picture, encoding="utf-8")
    elif not PICTURE.is_file() or PICTURE.read_text(encoding="utf-8") != picture:
        print(f"{PICTURE} is not up to date: python tools/draw_ideas.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
