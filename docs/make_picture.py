"""Draw docs/border.svg: the border on the frozen matrix, forward and for dx.

    python docs/make_picture.py

The letters are those of reference/lora_linear.py: y = [x | h] [w | s b]T, dx = [dy | dh] [w ; a].
"""

from __future__ import annotations

from pathlib import Path

FROZEN, TRAINED, ACTIVATION = "#c9d3df", "#f2a65a", "#8fb8de"
ROWS, WIDE, TALL, THIN = 70, 120, 96, 22  # pixels for M, K, N and R
LINES: list[str] = []


def box(x: float, y: float, width: float, height: float, fill: str, text: str, size: str) -> None:
    """A matrix: its letter inside, its shape below."""
    LINES.append(
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="#33415c"/>'
    )
    middle = x + width / 2
    LINES.append(f'<text x="{middle}" y="{y + height / 2 + 5}" class="letter">{text}</text>')
    if size:
        LINES.append(f'<text x="{middle}" y="{y + height + 16}" class="size">{size}</text>')


def sign(x: float, y: float, text: str) -> None:
    """Between two matrices."""
    LINES.append(f'<text x="{x}" y="{y}" class="letter">{text}</text>')


def forward(left: float, top: float) -> None:
    """y = [x | h] [w | s b]T."""
    LINES.append(f'<text x="{left}" y="{top - 14}" class="head">forward: one product</text>')
    box(left, top, TALL, ROWS, ACTIVATION, "y", "M x N")
    sign(left + TALL + 18, top + 40, "=")
    at = left + TALL + 36
    box(at, top, WIDE, ROWS, ACTIVATION, "x", "M x K")
    box(at + WIDE, top, THIN, ROWS, TRAINED, "h", "R")
    sign(at + WIDE + THIN + 14, top + 40, "·")
    at += WIDE + THIN + 28
    box(at, top, TALL, WIDE, FROZEN, "wᵀ", "")
    box(at, top + WIDE, TALL, THIN, TRAINED, "s bᵀ", "K + R x N")


def backward(left: float, top: float) -> None:
    """dx = [dy | dh] [w ; a]."""
    LINES.append(f'<text x="{left}" y="{top - 14}" class="head">dx: one product</text>')
    box(left, top, WIDE, ROWS, ACTIVATION, "dx", "M x K")
    sign(left + WIDE + 18, top + 40, "=")
    at = left + WIDE + 36
    box(at, top, TALL, ROWS, ACTIVATION, "dy", "M x N")
    box(at + TALL, top, THIN, ROWS, TRAINED, "dh", "R")
    sign(at + TALL + THIN + 14, top + 40, "·")
    at += TALL + THIN + 28
    box(at, top, WIDE, TALL, FROZEN, "w", "")
    box(at, top + TALL, WIDE, THIN, TRAINED, "a", "N + R x K")


def main() -> None:
    """Write the picture."""
    forward(20, 50)
    backward(480, 50)
    style = (
        ".letter{font:italic 17px Georgia,serif;text-anchor:middle;fill:#14213d}"
        ".size{font:11px sans-serif;text-anchor:middle;fill:#33415c}"
        ".head{font:bold 13px sans-serif;fill:#14213d}"
    )
    title = "The frozen matrix w with its border: s b beside it forward, a below it for dx"
    picture = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 930 240" role="img"><title>{title}'
        f"</title><style>{style}</style>",
        '<rect width="930" height="240" fill="#ffffff"/>',
        *LINES,
        "</svg>",
    ]
    target = Path(__file__).with_name("border.svg")
    target.write_text("\n".join(picture) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
