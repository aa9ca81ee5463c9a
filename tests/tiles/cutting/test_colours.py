"""Tiles have the painted colours and brightness, whether copied, stitched or read, whatever a slide's tags say."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image

from histossl.cli import main
from tests.raw_tiff import adobe_rgb, bare, jfif, jpeg_2000, tags, tiles, with_adobe, write_raw, ycc

SIDE = 512
APERIO = f"Aperio Image Library v10.2.24\r\n{SIDE}x{SIDE} [0,0 {SIDE}x{SIDE}] (256x256) Q=30|AppMag = 20|MPP = 0.5"
OME = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
ALL = ("--min-tissue", "0", "--min-sharpness", "0", "--min-saturation", "0")
KINDS: dict[str, Callable[[np.ndarray], bytes]] = {
    "JFIF": jfif,
    "subsampled": lambda tile: bare(jfif(tile, "4:2:0")),
    "bare YCbCr": lambda tile: bare(jfif(tile)),
    "Adobe YCbCr": lambda tile: with_adobe(bare(jfif(tile)), 1),
    "Adobe RGB": adobe_rgb,
    "RGB by component names": lambda tile: bare(adobe_rgb(tile), b"RGB"),
    "bare RGB": lambda tile: bare(adobe_rgb(tile)),
}


@pytest.fixture(scope="module")
def painted() -> np.ndarray:
    x, y = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    waves = np.sin(x / 17) * np.cos(y / 23)
    image = np.array([216, 150, 185]) + waves[..., None] * np.array([16, 28, 14])
    image[np.hypot(x % 64 - 32, y % 64 - 32) < 14] = (98, 58, 140)
    return image.round().astype(np.uint8)


def decoders(jpeg: bytes) -> list[np.ndarray]:
    pillow = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    return [pillow, simplejpeg.decode_jpeg(jpeg), imagecodecs.jpeg8_decode(jpeg)]


def worst(path: Path, truth: np.ndarray, *ways: str) -> float:
    """The largest mean difference between a tile of the zip and the truth, in any decoder."""
    found = [0.0]
    with zipfile.ZipFile(path) as store:
        assert json.loads(store.read("tiling.json"))["scales"][0]["way"] in ways
        names = [name for name in store.namelist() if name.endswith(".jpg")]
        for name in names:
            x, y = map(int, Path(name).stem.split("_")[:2])
            for pixels in decoders(store.read(name)):
                side = pixels.shape[0]
                found.append(float(np.abs(pixels.astype(int) - truth[y : y + side, x : x + side]).mean()))
    columns = truth.shape[1] // side
    assert len(names) == columns * (SIDE // side)
    return max(found)


FORMATS = {"tif": "<", "big": "<", "big-endian": ">", "svs": "<"}
WAYS = {"copied": ("--tile-px", "256"), "stitched": ("--tile-px", "128")}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, painted: np.ndarray) -> Path:
    """Slides of every kind, tag and format, and a workspace for each way of tiling."""
    folder = tmp_path_factory.mktemp("colours")
    (folder / "slides").mkdir()
    for number, (kind, make) in enumerate(KINDS.items()):
        stored = [make(tile) for tile in tiles(painted, 256)]
        for photometric in (2, 6):
            more: dict[str, Any] = {"t530": (3, [2, 2] if kind == "subsampled" else [1, 1])} if photometric == 6 else {}
            for format_, order in FORMATS.items():
                described = {"t270": (2, APERIO)} if format_ == "svs" else {}
                page = tags((SIDE, SIDE), compression=7, photometric=photometric, tile=256, **more, **described)
                name = f"{format_}-{photometric}-{number}.{'svs' if format_ == 'svs' else 'tif'}"
                write_raw(folder / "slides" / name, (page, stored), order=order, big=format_.startswith("big"))
    for way, options in WAYS.items():
        assert main(["tile", str(folder / "slides"), "-w", str(folder / way), "--mpp", "0.5", *options, *ALL]) == 0
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("photometric", [2, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_have_the_colours_of_the_jpegs(
    archive: Path, painted: np.ndarray, kind: str, photometric: int, format_: str, way: str
) -> None:
    (store,) = (archive / way).rglob(f"{format_}-{photometric}-{list(KINDS).index(kind)}.zip")
    assert worst(store, painted, way) < 4


def fourteen_bits(path: Path, image: np.ndarray) -> None:
    stored = (image.astype(np.uint32) * 16383 // 255).astype(np.uint16)
    per_cm = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, stored, photometric="rgb", tile=(256, 256), compression="zlib", metadata=None, **per_cm)


def significant_bits(path: Path, image: np.ndarray) -> None:
    stored = (image.astype(np.uint32) * 4095 // 255).astype(np.uint16)
    metadata = {**OME, "SignificantBits": 12}
    tifffile.imwrite(path, stored, photometric="rgb", tile=(256, 256), ome=True, byteorder=">", metadata=metadata)


def rgb_under_33003(path: Path, image: np.ndarray) -> None:
    tifffile.imwrite(path, image, photometric="rgb", tile=(256, 256), compression=33003, ome=True, metadata=OME)


def aperio_rgb_under_33003(path: Path, image: np.ndarray) -> None:
    page = tags((SIDE, SIDE), compression=33003, tile=256, t270=(2, APERIO))
    write_raw(path, (page, [jpeg_2000(tile, mct=True) for tile in tiles(image, 256)]))


def aperio_ycc_under_33005(path: Path, image: np.ndarray) -> None:
    page = tags((SIDE, SIDE), compression=33005, tile=256, t270=(2, APERIO))
    write_raw(path, (page, [jpeg_2000(ycc(tile)) for tile in tiles(image, 256)]))


def padded_strips(path: Path, image: np.ndarray) -> None:
    page = tags((SIDE - 1, SIDE), rows=1)
    write_raw(path, (page, [row.tobytes() for row in image[:, :-1]]), round_up=16)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("A1.tif", fourteen_bits),
        ("A1.ome.tif", significant_bits),
        ("A1.ome.tif", rgb_under_33003),
        ("A1.svs", aperio_rgb_under_33003),
        ("A1.svs", aperio_ycc_under_33005),
        ("A1.tif", padded_strips),
    ],
)
def test_other_slides_are_tiled_as_painted_and_scanned_as_stained(
    tmp_path: Path, painted: np.ndarray, cli: Any, name: str, write: Callable[[Path, np.ndarray], None]
) -> None:
    (tmp_path / "slides").mkdir()
    write(tmp_path / "slides" / name, painted)
    space = tmp_path / "workspace"
    tile_px = 128
    assert cli("scan", tmp_path / "slides", "-w", space).code == 0
    told = cli("tile", tmp_path / "slides", "-w", space, "--mpp", "0.5", "--tile-px", tile_px, *ALL)
    assert told.code == 0, told
    (store,) = space.rglob("*.zip")
    seen = painted[:, :-1] if write is padded_strips else painted
    assert worst(store, seen, "stitched", "read") < 5
    (row,) = csv.DictReader((space / "archive.csv").read_text().splitlines())
    assert row["status"] in ("ok", "warning")
    assert row["stain"] == "H&E"
