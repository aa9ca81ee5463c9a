"""One page, nothing loaded from elsewhere, names that cannot break it."""

from __future__ import annotations

import base64
import io
import pickle
import re
import tracemalloc
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histossl.core.config import ScanConfig, TissueConfig
from histossl.demo.paint import PaintedSlide
from histossl.slides import scan as scanning
from histossl.slides.contact_sheet import write_contact_sheet
from histossl.slides.grid import Grid
from histossl.slides.ledger import LedgerRow
from histossl.slides.quality.tissue import TissueMask
from histossl.slides.scan import Previews, ScanJob, look_at

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
    config = ScanConfig(tile_px=128, tissue=TissueConfig(max_ink=1, max_fold=1))
    job = ScanJob(painted_slide.path, LedgerRow("A1.tif"), config, None, "--slide-mpp", preview=True)
    row, preview = look_at(job, lambda count: None)
    assert preview is not None
    tiles = np.asarray(Image.open(io.BytesIO(base64.b64decode(preview.grid_png))).convert("RGBA"))[..., 3] > 0
    assert tiles.shape == (8, 8), "eight tiles of 128 px cross 1,024 px"
    assert preview.grid_size == (1.0, 1.0)
    assert row.expected_tiles <= tiles.sum() <= row.expected_tiles + 4, "some are turned down by their pixels"
    share = painted_slide.tissue_mask.reshape(8, 8, 8, 8).mean(axis=(1, 3))
    assert tiles[share > 0.7].all()
    assert not tiles[share < 0.3].any()
    mask = Image.open(io.BytesIO(base64.b64decode(preview.mask_png))).convert("RGBA")
    clear = np.asarray(mask)[..., 3] == 0
    assert abs(clear.mean() - painted_slide.tissue_mask.mean()) < 0.1

    write_contact_sheet(tmp_path / "sheet.html", "mine", [row], {"A1.tif": preview}, "1 file")
    text = (tmp_path / "sheet.html").read_text()
    page = Page(text)
    assert page.tags.count("article") == page.tags.count("figure") == 1
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"https?://|url\(|<script", text)
    assert 'class="grid" alt="" style="width:100.000%;height:100.000%"' in text


def test_a_slide_without_a_scale_is_shown_without_mask_and_grid(tmp_path: Path) -> None:
    Image.new("RGB", (900, 600), (200, 120, 170)).save(tmp_path / "region.png")
    job = ScanJob(tmp_path / "region.png", LedgerRow("region.png"), ScanConfig(), None, "--slide-mpp", preview=True)
    row, preview = look_at(job, lambda count: None)
    assert row.status == "unreadable"
    assert preview is not None
    assert (preview.width_px, preview.height_px) == (360, 240)
    write_contact_sheet(tmp_path / "sheet.html", "mine", [row], {"region.png": preview}, "1 file")
    page = Page((tmp_path / "sheet.html").read_text())
    assert page.tags.count("img") == 1
    assert all(not source.endswith("base64,") for source in page.sources)


def test_memory_does_not_grow_with_tiles_or_slides(tmp_path: Path) -> None:
    thumbnail = np.full((500, 1000, 3), 200, np.uint8)
    tissue = TissueMask(np.ones((500, 1000), bool), 102.5)
    preview = scanning._preview(thumbnail, tissue, np.arange(80_000), Grid(256, 256.0, 400, 200, 0.25))
    assert len(pickle.dumps(preview)) < 30e3, "80,000 tiles"
    assert preview.grid_size == pytest.approx((400 * 256 / 102500, 200 * 256 / 51250))

    tracemalloc.start()
    previews = Previews(tmp_path)
    for number in range(300):
        previews.add(f"{number}.tif", replace(preview, jpeg=f"{number} " + "x" * 200_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 45e6, "of 60 MB, 16 MB are held, and once more as they go to disk"
    assert previews["7.tif"].jpeg.startswith("7 ")
    assert previews.get("nowhere.tif") is None
    assert len(previews) == len(list(previews)) == 300


def test_names_are_escaped(tmp_path: Path) -> None:
    row = LedgerRow(NASTY, "unreadable", f"same content as {NASTY}", format="<i>")
    write_contact_sheet(tmp_path / "sheet.html", NASTY, [row], {}, NASTY)
    page = Page((tmp_path / "sheet.html").read_text())
    assert not {"b", "i"} & set(page.tags) - {"b"}
    assert page.tags.count("b") == 1, "the status, and nothing from a name"
    assert page.text.count(NASTY) == 5


def test_many_slides_are_pages_that_link_to_each_other(tmp_path: Path) -> None:
    rows = [LedgerRow(f"{number:04d}.svs", "warning" if number == 450 else "ok") for number in range(450 + 1)]
    stale, kept = tmp_path / "sheet-9.html", tmp_path / "sheet-mine.html"
    for path in (stale, kept):
        path.write_text("")
    first = tmp_path / "sheet.html"
    pages = write_contact_sheet(first, "mine", rows, {}, "451 files")
    assert [page.name for page in pages] == ["sheet-1.html", "sheet-2.html", "sheet-3.html"]
    assert not stale.exists()
    assert kept.exists()
    listed = Page(first.read_text())
    assert listed.sources == [page.name for page in pages]
    assert "0400.svs" in listed.text
    assert "50 ok, 1 warning" in listed.text
    read = [Page(page.read_text()) for page in pages]
    assert [page.tags.count("article") for page in read] == [200, 200, 51]
    assert read[0].sources == ["sheet.html", "sheet-2.html"] * 2
    assert read[1].sources == ["sheet.html", "sheet-1.html", "sheet-3.html"] * 2
    assert write_contact_sheet(first, "mine", rows[:200], {}, "200 files") == [first]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet-mine.html", "sheet.html"]
