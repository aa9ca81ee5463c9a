"""What the ledger archive.csv says of each slide once it was tiled, or was not."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from histossl.core.units import um_from_l0
from histossl.slides.ledger import OK, UNREADABLE, WARNING, LedgerRow, merged, read_ledger, write_ledger
from histossl.slides.quality.places import left_out
from histossl.tiles.cutting.tile_slide import SlideOutcome

TILED, NO_TILES, FAILED = "tiled", "no tiles", "failed"
LEDGER_EVERY_S = 10.0


class Ledger:
    """archive.csv in memory, written now and then: it can be told again from the zips, so little is lost."""

    def __init__(self, path: Path, rows: Sequence[LedgerRow], unseen: Iterable[str] = ()) -> None:
        self._path = path
        self._unseen = set(unseen)  # not written before they are looked at: nobody knows yet whether they are ok
        self._rows = {row.file: row for row in rows}
        self._written_s = time.monotonic()

    def __getitem__(self, file: str) -> LedgerRow:
        return self._rows[file]

    def put(self, row: LedgerRow) -> None:
        self._rows[row.file] = row
        self._unseen.discard(row.file)
        if time.monotonic() - self._written_s > LEDGER_EVERY_S:
            self.write()

    def write(self) -> None:
        seen = [row for file, row in self._rows.items() if file not in self._unseen]
        write_ledger(self._path, merged(read_ledger(self._path), seen))
        self._written_s = time.monotonic()

    def rows_of(self, files: Sequence[str]) -> list[LedgerRow]:
        return [self._rows[file] for file in files]


def tiled_row(row: LedgerRow, outcome: SlideOutcome, identity: str, stamp: str) -> LedgerRow:
    facts, counts = outcome.tiling["slide"], outcome.tiling["counts"]
    reason = why_none(outcome.tiling) if not counts["tiles"] else "; ".join(outcome.tiling["warnings"])
    return replace(
        row,
        **_verdict(row, reason),
        vendor=facts["vendor"],
        format=facts["format"],
        width_l0=facts["width_l0"],
        height_l0=facts["height_l0"],
        mpp=facts["mpp_l0"],
        mpp_source=facts["mpp_source"],
        num_tiles=counts["tiles"],
        tile_status=TILED if counts["tiles"] else NO_TILES,
        tile_reason=reason,
        tile_way="+".join(dict.fromkeys(scale["way"] for scale in outcome.tiling["scales"])),
        tile_mpp="+".join(f"{scale['mpp']:.4g}" for scale in outcome.tiling["scales"]),
        tile_settings=identity,
        tile_stamp=stamp,
        tile_twin="",
        hung="",
        verified=outcome.tiling.get("verified", ""),  # no zip of before 2026-12-01 says it
        rejected_tissue=counts["tissue"],
        rejected_region=counts["region"],
        rejected_blur=counts["blur"],
        rejected_fold=counts["fold"],
        rejected_ink=counts.get("ink", 0),  # no zip of before 2026-11-25 says it
        rejected_saturation=counts["saturation"],
        rejected_damaged=counts["damaged"],
    )


def _verdict(row: LedgerRow, reason: str) -> dict[str, Any]:
    """Status and reason of a slide that could be read. What scan warns of stays; what tile said before does not.

    A slide that scan could not use (no scale, say) and that now gave tiles is usable after all.
    """
    if row.status == WARNING and row.reason != row.tile_reason:
        return {"status": row.status, "reason": row.reason}
    return {"status": WARNING if reason else OK, "reason": reason}


def twin_row(row: LedgerRow, twin: str, holder: str, settings: str) -> LedgerRow:
    """`settings`: of both files, as they were when their content was compared; as long as they are, it need not be."""
    reason = f"same content as {twin}"
    told = _verdict(row, reason)
    none = replace(untiled(row), tile_status=NO_TILES, tile_reason=reason, num_tiles=0, **told)
    return replace(none, tile_twin=holder, tile_settings=settings)


def failed_row(row: LedgerRow, reason: str, identity: str, opened: bool) -> LedgerRow:
    return replace(
        untiled(row),
        status=WARNING if opened else UNREADABLE,
        reason=reason,
        tile_status=FAILED,
        tile_reason=reason,
        tile_settings=identity,
        tile_stamp=row.tile_stamp,  # of what its zip was made of, if it has one
    )


def untiled(row: LedgerRow) -> LedgerRow:
    return replace(
        row,
        tile_status="",
        tile_reason="",
        tile_way="",
        tile_mpp="",
        tile_settings="",
        tile_stamp="",
        tile_twin="",
        num_tiles=None,
        rejected_tissue=None,
        rejected_region=None,
        rejected_blur=None,
        rejected_fold=None,
        rejected_ink=None,
        rejected_saturation=None,
        rejected_damaged=None,
    )


def why_none(tiling: Mapping[str, Any]) -> str:
    """Why a slide gave no tile, from its tiling.json."""
    counts, facts = tiling["counts"], tiling["slide"]
    if not counts["places"]:
        width_um, height_um = (um_from_l0(facts[side], facts["mpp_l0"]) for side in ("width_l0", "height_l0"))
        scale = tiling["scales"][0]
        side_um = um_from_l0(scale["side_l0"], facts["mpp_l0"])
        return (
            f"smaller than one tile: {width_um:.0f} x {height_um:.0f} microns, "
            f"a tile of {tiling['tile_px']} px at {scale['mpp']:g} covers {side_um:.0f}"
        )
    return f"no tiles: of {counts['places']} places on the grid {left_out(counts, tiling['config']['tissue'])}"
