"""`histossl pretrain --slides DIR`: it tiles first, and says of the slides what `histossl tile` says."""

from pathlib import Path

import pytest
import tifffile
import typer

from histossl.backbones.loading import create_backbone, save_backbone
from histossl.cli import app

SMALL = "--backbone resnet10t --weights random --steps 1 --batch-size 8 --view-px 32 --workers 0"


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
    told = cli("pretrain", "--slides", slides, "-w", tmp_path / "pretrained", *SMALL.split())
    assert (tiled.code, told.code) == (0, 0)
    assert "of 1 of 2 slides" in told.err
    assert any("B1.tif: no microns-per-pixel" in line for line in warnings(tiled.err))
    assert set(warnings(tiled.err)) <= set(warnings(told.err))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--weights nowhere.pth", "no such file"),
        ("--set quue_size=5", "did you mean 'queue_size'"),
        ("--method dinov2", "take a ViT"),
        ("--view-set blur=0.5", "view-set"),
        ("--labels nowhere.csv", "nowhere.csv"),
        ("--exclude nowhere.txt", "--exclude nowhere.txt: cannot be read"),
        ("--subset nowhere", "no finished one of that name"),
        ("--precision bf61", "--precision "),
        ("--recompute", "is no ViT"),
    ],
)
def test_a_mistake_that_needs_no_tiles_is_told_before_hours_of_tiling(
    paint, cli, tmp_path: Path, more: str, said: str
) -> None:
    slides = paint("A1.tif", label="normal").path.parent
    told = cli("pretrain", "--slides", slides, "-w", tmp_path / "lab", *SMALL.split(), *more.split())
    assert told.code in (1, 2)
    assert said in told.err
    assert not (tmp_path / "lab").exists()


def test_where_no_slide_gave_a_tile_pretrain_says_why_and_never_to_tile(cli, tmp_path: Path, real_data) -> None:
    told = cli("pretrain", "--slides", real_data / "damaged", "-w", tmp_path / "lab", *SMALL.split())
    assert told.code == 1
    assert f"error: no slide gave a tile; {tmp_path}/lab/archive.csv has the reason of each" in told.err
    assert len(warnings(told.err)) == 4
    assert "no tiles yet" not in told.err


def test_a_scale_given_by_hand_goes_before_the_slide_s_own_with_a_warning(paint, cli, tmp_path: Path) -> None:
    slides = paint("A1.tif", label="normal", mpp=0.5).path.parent
    told = cli(
        "pretrain", "--slides", slides, "-w", tmp_path / "lab", "--slide-mpp", 0.25, "--mpp", 0.25, *SMALL.split()
    )
    assert told.code == 0
    assert "says 0.5 microns per pixel, --slide-mpp says 0.25, which is used" in " ".join(warnings(told.err))


def test_a_list_of_scales_reaches_the_slides_that_say_none(paint, cli, tmp_path: Path) -> None:
    slides = paint("A1.tif", label="normal").path.parent
    without_scale(slides / "A1.tif")
    (tmp_path / "mpp.csv").write_text("slide,mpp\nB1,0.5\n")
    told = cli(
        "pretrain", "--slides", slides, "-w", tmp_path / "lab", "--mpp-csv", tmp_path / "mpp.csv", *SMALL.split()
    )
    assert told.code == 0
    assert "of 2 of 2 slides" in told.err
    again = cli("pretrain", "-w", tmp_path / "lab", "--mpp-csv", tmp_path / "mpp.csv", *SMALL.split())
    assert again.code == 2
    assert "mpp.csv: is for reading slides, and without --slides none is read" in again.err


def test_pretrain_tile_and_scan_say_the_same_of_a_scale_given_by_hand() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name in ("slide_mpp", "mpp_csv"):
        helps = {
            option.help
            for command in ("scan", "tile", "pretrain", "distill")
            for option in commands[command].params
            if option.name == name
        }
        assert len(helps) == 1


@pytest.mark.parametrize("option", ["--tile-px", "--mpp"])
def test_tiles_of_no_size_or_scale_are_refused(paint, cli, tmp_path: Path, option: str) -> None:
    slides = paint("A1.tif").path.parent
    told = cli("pretrain", "--slides", slides, "-w", tmp_path / "lab", option, 0, *SMALL.split())
    assert told.code == 2
    assert f"error: {option} 0" in told.err


def test_a_finished_run_needs_its_weights_no_more(paint, cli, tmp_path: Path) -> None:
    slides = paint("A1.tif", label="normal").path.parent
    save_backbone(tmp_path / "start.safetensors", *create_backbone("resnet10t", "random"))
    options = SMALL.replace("--weights random", f"--weights {tmp_path / 'start.safetensors'}").split()
    assert cli("pretrain", "--slides", slides, "-w", tmp_path / "lab", *options).code == 0
    (tmp_path / "start.safetensors").unlink()
    told = cli("pretrain", "--slides", slides, "-w", tmp_path / "lab", *options)
    assert told.code == 0, told.err
    assert "finished before" in told.err
