"""Bytes flipped and files cut short, by the hundred: every file is answered for, none crashes or hangs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from histossl.core.config import ScanConfig
from histossl.demo.paint import paint_slide
from histossl.runtime.process_pool import run_jobs
from histossl.slides.ledger import LedgerRow
from histossl.slides.scan import ScanJob, look_at

TIME_LIMIT_S = 60
KNOWN_STATUS = ("ok", "warning", "unreadable")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Small slides of every kind that can be written here: three pyramids, OME, strips, rows, PNG, JPEG."""
    folder = tmp_path_factory.mktemp("sources")
    for name, options in {
        "jpeg.tif": {},
        "deflate.tif": {"compression": "deflate"},
        "aperio.svs": {"compression": "jp2k"},
    }.items():
        paint_slide(folder / name, width_px=320, height_px=256, tile_px=128, seed=1, **options)
    with tifffile.TiffFile(folder / "deflate.tif") as tiff:
        image = tiff.asarray()
    scale = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(
        folder / "a.ome.tif",
        image,
        photometric="rgb",
        tile=(64, 64),
        compression="lzw",
        metadata={"axes": "YXS", **scale},
    )
    tifffile.imwrite(folder / "strips.tif", image, photometric="rgb", rowsperstrip=16, compression="zstd")
    tifffile.imwrite(folder / "rows.tif", image, photometric="rgb", bigtiff=True)
    Image.fromarray(image).save(folder / "a.png")
    Image.fromarray(image).save(folder / "a.jpg", quality=85)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def real_sources(real_data: Path) -> list[Path]:
    slides, damaged = real_data / "slides", real_data / "damaged"
    return [
        slides / "boxes_dicom" / "boxes_0.dcm",
        slides / "dicom_small" / "sm_image.dcm",
        slides / "test_orient6.tif",
        damaged / "absurd_mpp_boxes.tiff",
        damaged / "unreadable.svs",
    ]


def mutations(content: bytes, count: int, rng: np.random.Generator) -> Iterator[bytes]:
    """Of each three: bytes flipped anywhere, bytes flipped in the header or the directories at the end, a cut."""
    for number in range(count):
        changed = bytearray(content)
        if number % 3 == 2:
            yield bytes(changed[: int(rng.integers(1, len(changed)))])
            continue
        edge = min(len(changed), 600)
        for _ in range(int(rng.integers(1, 9))):
            place = int(rng.integers(len(changed)))
            if number % 3 == 1:
                place = int(rng.integers(edge)) if rng.random() < 0.5 else len(changed) - 1 - int(rng.integers(edge))
            changed[place] ^= int(rng.integers(1, 256))
        yield bytes(changed)


def answers(folder: Path, sources: list[Path], each: int, seed: int) -> dict[str, LedgerRow]:
    """Every mutated file, looked at as scan does. Each in a folder of its own, where a DICOM series would be."""
    rng = np.random.default_rng(seed)
    jobs: list[ScanJob] = []
    for source in sources:
        for number, content in enumerate(mutations(source.read_bytes(), each, rng)):
            path = folder / f"{source.name}-{number}" / source.name
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
            file = path.relative_to(folder).as_posix()
            jobs.append(ScanJob(path, LedgerRow(file), ScanConfig(tile_px=64), 0.5, "--slide-mpp"))
    rows: dict[str, LedgerRow] = {}
    for event in run_jobs(look_at, jobs, 2, TIME_LIMIT_S):
        assert event.kind != "failed", f"{jobs[event.job].row.file}: {event.value}"
        if event.kind == "done":
            row = event.value[0]
            assert row.file not in rows
            rows[row.file] = row
    assert len(rows) == len(jobs)
    shutil.rmtree(folder)
    return rows


def check(rows: dict[str, LedgerRow]) -> None:
    for row in rows.values():
        assert row.status in KNOWN_STATUS
        assert row.reason or row.status == "ok", row
        assert not row.reason.startswith("unexpected "), row
        assert "\n" not in row.reason
    readable = sum(row.readable for row in rows.values())
    assert 0 < readable < len(rows), "the mutations are either harmless or all fatal: they test nothing"


def test_three_hundred_damaged_painted_files_are_all_answered_for(tmp_path: Path, sources: list[Path]) -> None:
    rows = answers(tmp_path / "fuzz", sources, 39, seed=0)
    assert len(rows) >= 300
    check(rows)


@pytest.mark.data
def test_damaged_real_files_are_all_answered_for(tmp_path: Path, real_sources: list[Path]) -> None:
    check(answers(tmp_path / "fuzz", real_sources, 21, seed=1))


@pytest.mark.slow
def test_thousands_of_damaged_files_are_all_answered_for(tmp_path: Path, sources: list[Path]) -> None:
    check(answers(tmp_path / "fuzz", sources, 400, seed=2))


@pytest.mark.slow
@pytest.mark.data
def test_many_damaged_large_real_slides_are_all_answered_for(
    tmp_path: Path, real_data: Path, real_sources: list[Path]
) -> None:
    whole = [real_data / "slides" / name for name in ("CMU-1-Small-Region.svs", "kidney-48-5.tif")]
    check(answers(tmp_path / "fuzz", [*real_sources, *whole, real_data / "colon" / "slides" / "S-2a.tif"], 60, seed=3))
