"""The contact sheet: self-contained pages with every slide's thumbnail, its tissue and its tile grid.

For the eyes: a mask that is wrong, ink that was kept, a slide that is upside down show here in seconds. A picture is
some 25 kB, so of more than PAGE_FILES files the sheet is a list of pages, each of which a browser opens at once.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

from histossl.core.anonymous import names_above
from histossl.core.text import in_html
from histossl.core.workspace import written_aside
from histossl.slides.ledger import OK, UNREADABLE, WARNING, LedgerRow, hidden
from histossl.slides.scan import Preview

PAGE_FILES = 200

STYLE = """
:root { color-scheme: light dark; --line: #8884; --ok: #1a7f37; --warning: #9a6700; --unreadable: #cf222e; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem; max-width: 120rem; }
h1 { font-size: 1.3rem; margin: 0 0 .2rem; }
p.totals { margin: 0 0 1rem; }
.bar { position: sticky; top: 0; background: Canvas; padding: .5rem 0; z-index: 1; display: flex; gap: 1.2rem;
       flex-wrap: wrap; border-bottom: 1px solid var(--line); margin-bottom: 1rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1rem; align-items: start; }
article { border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
figure { margin: 0; position: relative; background: #fff; aspect-ratio: var(--w) / var(--h); }
figure > * { position: absolute; inset: 0; width: 100%; height: 100%; }
.grid { image-rendering: pixelated; }
body:has(#show-mask:not(:checked)) .mask, body:has(#show-grid:not(:checked)) .grid { display: none; }
body:has(#only-trouble:checked) article.ok { display: none; }
.about { padding: .5rem .7rem; }
.about h2 { font-size: .95rem; margin: 0; overflow-wrap: anywhere; }
.about p { margin: .15rem 0 0; overflow-wrap: anywhere; }
.ok .status { color: var(--ok); }
.warning .status { color: var(--warning); }
.unreadable .status { color: var(--unreadable); }
nav { margin: 0 0 1rem; }
td { padding: .15rem 1.2rem .15rem 0; overflow-wrap: anywhere; }
"""


def write_contact_sheet(
    path: Path, title: str, rows: Sequence[LedgerRow], previews: Mapping[str, Preview], totals: str
) -> list[Path]:
    """All slides of a scan: on `path`, or if they are many on pages beside it that `path` lists. Returns these.

    Nothing on a page is loaded from elsewhere, and every name is escaped, or hidden in an anonymous workspace.
    """
    names = names_above(path)
    previews = {names.file(file): preview for file, preview in previews.items()} if names.key else previews
    rows, title, totals = [hidden(row, names) for row in rows], names.sentence(title), names.sentence(totals)
    parts = [rows[start : start + PAGE_FILES] for start in range(0, len(rows), PAGE_FILES)] or [rows]
    if len(parts) == 1:
        pages = [path]
        _write_page(path, title, rows, previews, totals, "")
    else:
        pages = [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, len(parts) + 1)]
        for number, (page, part) in enumerate(zip(pages, parts, strict=True)):
            links = _links(path, pages, number)
            _write_page(page, f"{title}, page {number + 1} of {len(pages)}", part, previews, "", links)
        _write_list(path, title, pages, parts, totals)
    # Of a larger archive's scan before.
    for old in path.parent.glob(f"{path.stem}-*{path.suffix}"):
        if re.fullmatch(r"-\d+", old.stem.removeprefix(path.stem)) and old not in pages:
            with contextlib.suppress(FileNotFoundError):
                old.unlink()
    return pages


@contextmanager
def _page(path: Path, title: str, totals: str) -> Iterator[TextIO]:
    with written_aside(path) as aside, aside.open("w", encoding="utf-8") as page:
        page.write(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{in_html(title)}</title>\n'
            f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style></head><body>\n'
            f'<h1>{in_html(title)}</h1><p class="totals">{in_html(totals).replace(chr(10), "<br>")}</p>\n'
        )
        yield page
        page.write("</body></html>\n")


def _write_page(
    path: Path, title: str, rows: Sequence[LedgerRow], previews: Mapping[str, Preview], totals: str, links: str
) -> None:
    with _page(path, title, totals) as page:
        page.write(
            f"{links}"
            '<div class="bar">'
            '<label><input type="checkbox" id="show-mask" checked> tissue (green line; the rest is veiled)</label>'
            '<label><input type="checkbox" id="show-grid" checked> tiles (blue, strong and faint by turns; '
            "of several scales the finest)</label>"
            '<label><input type="checkbox" id="only-trouble"> only warnings and unreadable files</label></div>\n'
            "<main>\n"
        )
        for row in rows:
            page.write(_card(row, previews.get(row.file)))
        page.write(f"</main>{links}")


def _write_list(
    path: Path, title: str, pages: Sequence[Path], parts: Sequence[Sequence[LedgerRow]], totals: str
) -> None:
    """Which files are on which page, and how many of them have something to say."""
    with _page(path, title, totals) as page:
        page.write("<table>\n")
        for number, (other, part) in enumerate(zip(pages, parts, strict=True), start=1):
            counts = Counter(row.status for row in part)
            said = ", ".join(f"{counts[status]} {status}" for status in (OK, WARNING, UNREADABLE) if counts[status])
            page.write(
                f'<tr><td><a href="{quote(other.name)}">page {number}</a></td><td>{in_html(part[0].file)}</td>'
                f"<td>to {in_html(part[-1].file)}</td><td>{said}</td></tr>\n"
            )
        page.write("</table>")


def _links(first: Path, pages: Sequence[Path], number: int) -> str:
    told = [f'<a href="{quote(first.name)}">all pages</a>']
    if number > 0:
        told.append(f'<a href="{quote(pages[number - 1].name)}">previous</a>')
    if number + 1 < len(pages):
        told.append(f'<a href="{quote(pages[number + 1].name)}">next</a>')
    return f"<nav>{' &middot; '.join(told)}</nav>\n"


def _card(row: LedgerRow, preview: Preview | None) -> str:
    facts = [
        row.format,
        f"{row.width_l0:,} x {row.height_l0:,} px" if row.width_l0 and row.height_l0 else "",
        f"{row.mpp:.4g} microns per pixel" if row.mpp else "",
        row.stain,
        f"{row.tissue_mm2:g} mm² tissue" if row.tissue_mm2 is not None else "",
        f"{row.expected_tiles:,} tiles" if row.expected_tiles is not None else "",
    ]
    told = f'<p><b class="status">{in_html(row.status)}</b> {in_html(row.reason)}</p>'
    return (
        f'<article class="{in_html(row.status)}">{_figure(preview) if preview else ""}<div class="about">'
        f"<h2>{in_html(row.file)}</h2><p>{in_html(', '.join(fact for fact in facts if fact))}</p>{told}"
        "</div></article>\n"
    )


def _figure(preview: Preview) -> str:
    grid = mask = ""
    if preview.mask_png:
        mask = f'<img class="mask" alt="" src="data:image/png;base64,{preview.mask_png}">'
    if preview.grid_png:
        width, height = (f"{share:.3%}" for share in preview.grid_size)
        grid = (
            f'<img class="grid" alt="" style="width:{width};height:{height}" '
            f'src="data:image/png;base64,{preview.grid_png}">'
        )
    return (
        f'<figure style="--w:{preview.width_px};--h:{preview.height_px}">'
        f'<img alt="" src="data:image/jpeg;base64,{preview.jpeg}">{grid}{mask}</figure>'
    )
