"""A picture of queries with their top answers."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LABEL, COLUMN = 64, 10, 250, 350
RIGHT, WRONG, INK, PAPER, QUIET = (22, 130, 60), (190, 40, 40), (30, 30, 30), (255, 255, 255), (120, 120, 120)


def contact_sheet(images: Sequence[np.ndarray], texts: Sequence[str], similarity: np.ndarray, count: int = 8) -> np.ndarray:
    """Draws `count` image queries with their best texts and as many text queries with their best images.

    Args:
        images: `(height, width, 3)` uint8, N of them.
        texts: N of them; text i belongs to image i.
        similarity: `(N, N)`, images by texts.
        count: queries in each direction, evenly spread over the N.

    Returns:
        The picture, `(height, width, 3)` uint8.
    """
    queries = np.unique(np.linspace(0, len(texts) - 1, count).astype(int))
    height = (len(queries) + 1) * (CELL + GAP) * 2 + GAP
    sheet = Image.new("RGB", (CELL + GAP * 4 + COLUMN * 2, height), PAPER)
    draw, font, bold = ImageDraw.Draw(sheet), ImageFont.load_default(13), ImageFont.load_default(17)

    y = _title(draw, bold, GAP, "Image to text: the five nearest texts (green: the right one)")
    for query in map(int, queries):
        sheet.paste(_picture(images[query]), (GAP, y))
        for place, answer in enumerate(_top(similarity[query])):
            column, row = divmod(place, 3)
            position = (CELL + 3 * GAP + column * COLUMN, y + row * 21)
            score = similarity[query, answer]
            colour = RIGHT if answer == query else WRONG if place == 0 else QUIET
            draw.text(position, f"{place + 1}. {score:.2f}  {_short(texts[answer], 44)}", colour, font)
        y += CELL + GAP
    y = _title(draw, bold, y + GAP, "Text to image: the five nearest images (framed: the right one)")
    for query in map(int, queries):
        for line, part in enumerate(_wrap(texts[query], 36)):
            draw.text((GAP, y + 6 + line * 18), part, INK, font)
        for place, answer in enumerate(_top(similarity[:, query])):
            x = GAP + LABEL + place * (CELL + GAP)
            if answer == query:
                draw.rectangle((x - 3, y - 3, x + CELL + 2, y + CELL + 2), RIGHT)
            sheet.paste(_picture(images[answer]), (x, y))
        y += CELL + GAP
    return np.asarray(sheet.crop((0, 0, sheet.width, y + GAP)))


def _title(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, y: int, text: str) -> int:
    draw.text((GAP, y), text, INK, font)
    return y + 32


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image).resize((CELL, CELL), Image.Resampling.NEAREST)


def _top(scores: np.ndarray) -> list[int]:
    return [int(i) for i in np.argsort(-scores, kind="stable")[:5]]


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:3]
