"""`histossl pretrain --slides DIR`: it tiles first, and says of the slides what `histossl tile` says."""

from pathlib import Path

import tifffile

SMALL = "--backbone resnet10t --weights random --steps 1 --batch-size 8 --view-px 32 --workers 0".split()


def warnings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning:")]


def without_scale(path: Path) -> None:
    """Beside a slide, its pixels in a file that says no microns per pixel."""
    with tifffile.TiffFile(path) as file:
        pixels = file.pages[0].asarray()
    tifffile.imwrite(path.with_name("B1.tif"), pixels, tile=(256, 256), photometric="rgb")


def test_pretrain_tells_what_tiling_found_wrong_as_tile_does(paint, cli, tmp_path: Path) -> None:
    slides = paint("A1.tif", label="normal").path.parent
    without_scale(slides / "A1.tif")
    tiled = cli("tile", "--slides", slides, "-w", tmp_path / "tiled", "--workers", 1)
    told = cli("pretrain", "--slides", slides, "-w", tmp_path / "pretrained", *SMALL)
    assert (tiled.code, told.code) == (0, 0)
    assert "of 1 of 2 slides" in told.err
    assert any("B1.tif: no microns-per-pixel" in line for line in warnings(tiled.err))
    assert set(warnings(tiled.err)) <= set(warnings(told.err))


def test_where_no_slide_gave_a_tile_pretrain_says_why_and_never_to_tile(cli, tmp_path: Path, real_data) -> None:
    told = cli("pretrain", "--slides", real_data / "damaged", "-w", tmp_path / "lab", *SMALL)
    assert told.code == 1
    assert f"error: no slide gave a tile; {tmp_path}/lab/archive.csv has the reason of each" in told.err
    assert len(warnings(told.err)) == 4
    assert "no tiles yet" not in told.err
