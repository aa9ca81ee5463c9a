"""A contact sheet of views, for a person to see what the model will see before it is trained on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from histossl.core.text import shown

GAP_PX = 6
LINE_PX = 16
PAPER, INK = (255, 255, 255), (40, 40, 40)


def contact_sheet(title: str, rows: Sequence[str], tiles: Tensor, columns: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """One row per tile: the tile itself (uint8 (B, 3, H, H)), then its views.

    `columns` are (heading, views (B, 3, h, h) in [0, 1]); views keep their own size, so small crops look small.
    """
    pictures = [("tile", tiles)] + [(heading, _as_bytes(views)) for heading, views in columns]
    widths = [max(views.shape[3], 12 * len(heading) // 2) for heading, views in pictures]
    row_px = max(views.shape[2] for _, views in pictures) + LINE_PX
    top = 2 * LINE_PX + GAP_PX
    sheet = Image.new(
        "RGB", (sum(widths) + GAP_PX * (len(widths) + 1), top + len(rows) * (row_px + GAP_PX) + GAP_PX), PAPER
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    pen.text((GAP_PX, 2), title, INK, font)
    left = GAP_PX
    for (heading, views), width in zip(pictures, widths, strict=True):
        pen.text((left, 2 + LINE_PX), heading, INK, font)
        for number, view in enumerate(views):
            picture = Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
            sheet.paste(picture, (left, top + number * (row_px + GAP_PX)))
        left += width + GAP_PX
    for number, caption in enumerate(rows):
        pen.text((GAP_PX, top + number * (row_px + GAP_PX) + row_px - LINE_PX + 1), shown(caption), INK, font)
    return sheet


def _as_bytes(views: Tensor) -> Tensor:
    return (views * 255).round().to(torch.uint8)
