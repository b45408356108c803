"""Draws docs/design.svg, the picture in docs/design.md: python docs/design_picture.py"""

import html
from pathlib import Path

WIDTH, HEIGHT = 960, 660
BLUE, ORANGE, GREEN, GREY = "#dbe9f6", "#fde3c8", "#d9efdc", "#f1f1f1"
parts = []


def text(x, y, words, size=13, weight="normal", anchor="middle", color="#222"):
    parts.append(
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{color}">{html.escape(words)}</text>'
    )


def box(x, y, width, height, letter, lines, color):
    parts.append(
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{color}" '
        'stroke="#555"/>'
    )
    middle = y + height / 2 + 4 - 8 * (len(lines) - 1)
    for i, line in enumerate(lines):
        text(x + width / 2, middle + 16 * i, line, 13 if i == 0 else 12,
             "bold" if i == 0 else "normal")  # fmt: skip
    if letter:
        parts.append(f'<circle cx="{x}" cy="{y}" r="11" fill="#00796b"/>')
        text(x, y + 5, letter, 13, "bold", color="white")


def arrow(*points, head=True):
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    end = ' marker-end="url(#head)"' if head else ""
    parts.append(f'<path d="{path}" fill="none" stroke="#333" stroke-width="1.6"{end}/>')


def frame(x, y, width, height, color):
    parts.append(
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="none" '
        f'stroke="{color}" stroke-width="1.5" stroke-dasharray="3 4"/>'
    )


# -- a batch's way ----------------------------------------------------------------------------
text(20, 28, "A batch's way: in each replica, K times, without communication", 16, "bold", "start")
box(30, 95, 120, 64, "A", ["your data", "a global batch"], GREY)
box(190, 95, 120, 64, "B", ["its share", "1/P, one ahead"], GREY)
frame(345, 62, 395, 130, "#1565c0")
text(560, 80, "the local steps: a loop in one tf.function", 12, color="#1565c0")
box(365, 100, 150, 64, "C", ["your train_step", "forward, backward"], BLUE)
box(565, 100, 150, 64, "D", ["apply", "inner optimizer: w_j"], BLUE)
box(790, 95, 140, 64, "E", ["K steps?", "Python counts"], GREEN)
arrow((150, 127), (186, 127))
arrow((310, 127), (361, 127))
arrow((515, 132), (561, 132))
arrow((640, 164), (640, 180), (440, 180), (440, 168))
text(540, 177, "next batch", 11)
arrow((740, 127), (786, 127))
arrow((860, 95), (860, 46), (440, 46), (440, 96))
text(650, 42, "not yet", 12)
arrow((895, 159), (895, 228), (10, 228), (10, 355), (26, 355))
text(480, 222, "the block is full, or the data, or the epoch, ends here", 12)

# -- a delta's way ----------------------------------------------------------------------------
text(20, 268, "A delta's way: a boundary, once in K steps", 16, "bold", "start")
for i, y in enumerate((320, 500)):
    text(30, y - 8 if i else y - 16, f"replica {i}", 12, "bold", "start", "#00796b")
    letters = "FGIJ" if i == 0 else " " * 4
    box(30, y, 140, 70, letters[0].strip(), ["leave", "delta = w_j − anchor", "finite?"], ORANGE)
    box(205, y, 140, 70, letters[1].strip(), ["pack", "few messages,", "codes, header"], ORANGE)
    box(570, y, 160, 70, letters[2].strip(),
        ["outer step", "v ← beta v + d", "anchor ← anchor + v"], ORANGE)  # fmt: skip
    box(770, y, 150, 70, letters[3].strip(), ["land", "w_j ← anchor"], ORANGE)
    arrow((170, y + 35), (201, y + 35))
    arrow((345, y + 35), (396, y + 35))
    arrow((520, y + 35), (566, y + 35))
    arrow((730, y + 35), (766, y + 35))
exchange = ["exchange", "all-reduce:", "the sums over", "all replicas"]
box(400, 300, 120, 290, "H", exchange, "#f8cfcf")
text(645, 415, "d = sum / replicas in it", 12)
box(570, 432, 160, 46, "K", ["the summed header", "Python: stop? K next?"], GREEN)
arrow((520, 455), (566, 455))
arrow((845, 390), (845, 425), (945, 425), (945, 46), (860, 46), head=False)
text(890, 418, "next block", 12)
frame(385, 285, 150, 320, "#c62828")
text(460, 622, "with overlap: in a thread, while the next", 12, color="#c62828")
text(460, 638, "block's first steps compute", 12, color="#c62828")

Path(__file__).with_name("design.svg").write_text(
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
    'font-family="Helvetica, Arial, sans-serif" role="img" '
    'aria-label="The way of a batch and of a delta, lettered A to K">\n'
    '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
    'markerHeight="7" orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="#333"/></marker></defs>\n'
    f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
)
