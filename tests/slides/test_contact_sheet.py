"""One page, nothing loaded from elsewhere, names that cannot break it."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from histossl.config import ScanConfig
from histossl.demo.paint import PaintedSlide
from histossl.slides.contact_sheet import write_contact_sheet
from histossl.slides.ledger import LedgerRow
from histossl.slides.scan import ScanJob, look_at

NASTY = '<b>&"bold".svs'


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_shows_thumbnail_mask_and_grid(tmp_path: Path, painted_slide: PaintedSlide) -> None:
    config = ScanConfig(tile_px=128)
    job = ScanJob(painted_slide.path, LedgerRow("A1.tif"), config, None, "--slide-mpp", preview=True)
    row, preview = look_at(job, lambda count: None)
    assert preview is not None
    assert len(preview.places) == row.expected_tiles
    assert preview.side[0] * 8 == np.float64(1).item(), "eight tiles of 128 px cross 1,024 px"
    mask = Image.open(io.BytesIO(base64.b64decode(preview.mask_png))).convert("RGBA")
    clear = np.asarray(mask)[..., 3] == 0
    assert abs(clear.mean() - painted_slide.tissue_mask.mean()) < 0.1

    write_contact_sheet(tmp_path / "sheet.html", "mine", [row], {"A1.tif": preview}, "1 file")
    text = (tmp_path / "sheet.html").read_text()
    page = Page(text)
    assert page.tags.count("article") == page.tags.count("figure") == 1
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"https?://|url\(|<script", text)
    assert text.count("M") >= len(preview.places)


def test_names_are_escaped(tmp_path: Path) -> None:
    row = LedgerRow(NASTY, "unreadable", f"same content as {NASTY}", format="<i>")
    write_contact_sheet(tmp_path / "sheet.html", NASTY, [row], {}, NASTY)
    page = Page((tmp_path / "sheet.html").read_text())
    assert not {"b", "i"} & set(page.tags) - {"b"}
    assert page.tags.count("b") == 1, "the status, and nothing from a name"
    assert page.text.count(NASTY) == 5
