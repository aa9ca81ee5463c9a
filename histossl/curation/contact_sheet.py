"""The contact sheet of a subset: pairs just above and just below the threshold, and what was picked. One page, offline.

For the eyes: whether 0.9 is right for this archive is seen in a minute on twenty pairs, and nowhere else.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import simplejpeg
import torch

from histossl.core.text import in_html
from histossl.core.workspace import written_aside
from histossl.tiles.store.index import TileIndex
from histossl.tiles.stream.loader import decode_good_tiles
from histossl.views.recipe import clean_view

SHOWN_PX = 112
STYLE = """
:root { color-scheme: light dark; --line: #8884; --drop: #cf222e; --keep: #1a7f37; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem; max-width: 100rem; }
h1 { font-size: 1.3rem; margin: 0 0 .2rem; }
h2 { font-size: 1.05rem; margin: 1.6rem 0 .1rem; border-top: 1px solid var(--line); padding-top: .8rem; }
h2.dropped { color: var(--drop); } h2.kept { color: var(--keep); }
p { margin: 0 0 .6rem; white-space: pre-line; }
.rows { display: flex; flex-wrap: wrap; gap: .8rem 1.2rem; }
figure { margin: 0; } figure div { display: flex; gap: 2px; }
figure img { display: block; width: 112px; height: 112px; }
figcaption { font-size: 12px; max-width: 232px; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Strip:
    """Tiles side by side, and what is said below them."""

    tiles: tuple[int, ...]
    caption: str


@dataclass(frozen=True)
class Section:
    heading: str
    about: str
    strips: Sequence[Strip]
    kind: str = ""  # dropped, kept


def write_sheet(path: Path, index: TileIndex, title: str, about: str, sections: Sequence[Section]) -> None:
    """Nothing on the page is loaded from elsewhere, and every name is escaped."""
    with written_aside(path) as aside, aside.open("w", encoding="utf-8") as page:
        page.write(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{in_html(title)}</title>\n'
            f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style></head><body>\n'
            f"<h1>{in_html(title)}</h1><p>{in_html(about)}</p>\n"
        )
        for section in sections:
            page.write(
                f'<h2 class="{in_html(section.kind)}">{in_html(section.heading)}</h2><p>{in_html(section.about)}</p>\n'
                '<div class="rows">\n'
            )
            page.writelines(_figure(index, strip) for strip in section.strips)
            page.write("</div>\n")
        page.write("</body></html>\n")


def place_of(index: TileIndex, number: int) -> str:
    """'A1 at 1024, 512': where a person finds the tile in a viewer."""
    slide = index.slides[int(index.slide_of([number])[0])]
    x_l0, y_l0 = index.coords_l0([number])[0].tolist()
    return f"{slide} at {x_l0}, {y_l0}"


def _figure(index: TileIndex, strip: Strip) -> str:
    pixels, _ = decode_good_tiles(index, list(strip.tiles))
    small = (clean_view(pixels, SHOWN_PX) * 255).round().to(torch.uint8) if len(pixels) else pixels
    pictures = "".join(
        '<img alt="" src="data:image/jpeg;base64,'
        f'{base64.b64encode(simplejpeg.encode_jpeg(tile.permute(1, 2, 0).contiguous().numpy(), 88)).decode()}">'
        for tile in small
    )
    return f"<figure><div>{pictures}</div><figcaption>{in_html(strip.caption)}</figcaption></figure>\n"
