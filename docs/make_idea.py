"""Draws docs/idea.svg, the picture of the idea in the README: python docs/make_idea.py."""

from pathlib import Path

INK, SOFT, HOT, PATH = "#334155", "#cbd5e1", "#dc2626", "#2563eb"


def grid(x: float, y: float, side: float, cells: int, hot: tuple[int, int] | None = None, fill: str = "#f1f5f9") -> str:
    step = side / cells
    parts = []
    for row in range(cells):
        for column in range(cells):
            colour = HOT if (row, column) == hot else fill
            parts.append(
                f'<rect x="{x + column * step:.1f}" y="{y + row * step:.1f}" width="{step:.1f}" height="{step:.1f}" '
                f'fill="{colour}" stroke="{SOFT}"/>'
            )
    return "".join(parts)


def text(x: float, y: float, words: str, size: int = 13, colour: str = INK, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1} {y1} L{x2} {y2}" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'


def curve(points: list[tuple[float, float]], colour: str, dash: str = "") -> str:
    path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'


def draw() -> str:
    parts = [grid(30, 60, 120, 7, (4, 5)), *captions(90, "image", "a place in it")]
    parts.append(arrow(165, 120, 195, 120))
    for number, (side, label) in enumerate([(64, "1"), (56, "2"), (48, "…"), (40, "L")]):
        x = 210 + number * 68
        parts.append(grid(x, 120 - side / 2, side, 4, (2, 3)))
        parts.append(text(x + side / 2, 172, f"block {label}" if label != "…" else "…", 11))
    parts += captions(335, "frozen backbone", "pool to H x W, whiten to D")
    parts.append(arrow(466, 120, 496, 120))
    depth = [(510 + 28 * step, value) for step, value in enumerate([150, 138, 146, 120, 128, 104, 112])]
    clean = [(x, y + shift) for (x, y), shift in zip(depth, [2, -2, 2, 3, -2, 2, -3], strict=True)]
    odd = [(x, y - lift) for (x, y), lift in zip(depth, [0, 4, 2, 18, 34, 46, 58], strict=True)]
    parts += [curve(depth, PATH), curve(clean, "#64748b", "4 3"), curve(odd, HOT)]
    parts += captions(594, "trajectories [B, H, W, L, D]", "a place's path through the depth")
    parts.append(arrow(696, 120, 726, 120))
    for edge in (740, 860):
        shape = f"M{edge} 70 L800 100 L800 140 L{edge} 170 Z"
        parts.append(f'<path d="{shape}" fill="#dbeafe" stroke="{PATH}"/>')
    parts += captions(800, "sequence model + LoRA", "trained batch by batch")
    parts.append(arrow(875, 120, 905, 120))
    parts += [grid(920, 60, 120, 7, (4, 5), "#ffffff"), *captions(980, "anomaly map", "what does not belong")]
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>'
    )
    frame = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1070 250" font-family="system-ui, sans-serif">'
    return f'{frame}{head}<rect width="1070" height="250" fill="#ffffff"/>{"".join(parts)}</svg>\n'


def captions(x: float, title: str, subtitle: str) -> list[str]:
    return [text(x, 205, title), text(x, 224, subtitle, 11, "#64748b")]


if __name__ == "__main__":
    Path(__file__).with_name("idea.svg").write_text(draw(), encoding="utf-8")
