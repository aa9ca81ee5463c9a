"""`histossl views`: a picture of the tiles and of what the recipe makes of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_store import write_synthetic_store

from histossl.core.workspace import Workspace
from histossl.views.contact_sheet import GAP_PX, LINE_PX, contact_sheet
from histossl.views.recipe import make_views, recipe_named

TOP = 2 * LINE_PX + GAP_PX


def test_a_sheet_shows_the_tiles_and_their_views_at_their_sizes():
    tiles = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = make_views(tiles, recipe_named("dino", 48, local_px=16, num_local=1), 0, torch.arange(3))
    sheet = np.array(contact_sheet("dino", list("ABC"), tiles, list(zip(("one", "two", "small"), views, strict=True))))
    row = TOP + 1 * (64 + LINE_PX + GAP_PX)
    assert (sheet[row : row + 64, GAP_PX : GAP_PX + 64] == tiles[1].permute(1, 2, 0).numpy()).all()
    left = GAP_PX + 64 + GAP_PX
    first_view = (views[0][1] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert (sheet[row : row + 48, left : left + 48] == first_view).all()


def test_views_of_slides_and_of_their_tiles(painted_archive, tmp_path, cli):
    straight = tmp_path / "straight.png"
    told = cli("views", "--slides", painted_archive.directory, "--tiles", 5, "--view-px", 64, "--output", straight)
    assert told.code == 0, told.err
    assert "5 tiles, 2 views each, 2 times (mocov2-histology)" in " ".join(told.err.split())
    with Image.open(straight) as sheet:
        assert sheet.size[0] > 256 + 4 * 64
    workspace = tmp_path / "workspace"
    assert cli("tile", "--slides", painted_archive.directory, "-w", workspace, "--workers", 1).code == 0
    stored = tmp_path / "stored.png"
    arguments = ("views", "-w", workspace, "--recipe", "dinov2", "--draws", 1, "--tiles", 3, "--output", stored)
    assert cli(*arguments).code == 0
    once = stored.read_bytes()
    assert cli(*arguments).code == 0
    assert stored.read_bytes() == once  # the seed decides
    assert cli(*arguments, "--seed", 1).code == 0
    assert stored.read_bytes() != once


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--recipe", "moco-v2"), "did you mean 'mocov2'"),
        (("--tiles", 0), "--tiles 0: must be 1 to 64"),
        (("--draws", 99), "--draws 99: must be 1 to 8"),
        (("--output", "views.jpg"), "--output views.jpg: must be a .png file"),
        (("--output", "mistyped/views.png"), "--output mistyped/views.png: there is no folder mistyped"),
        (("--slides", "nowhere"), "nowhere: no such folder"),
        ((), "no tiles yet"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(arguments, line, tmp_path, cli):
    told = cli("views", "-w", tmp_path / "workspace", *arguments)
    assert told.code in (1, 2)
    assert line in " ".join(told.err.split())
    assert not (tmp_path / "views.png").exists()


def test_a_damaged_tile_leaves_the_rest_of_the_sheet(tmp_path, cli):
    workspace = Workspace(tmp_path / "damaged")
    index = write_synthetic_store(workspace, slides=("A1",), tiles_per_slide=4, tile_px=40)
    row = index.table[1]
    with workspace.zip_of("A1").open("r+b") as file:
        file.seek(int(row["offset"]) + 20)
        file.write(bytes(int(row["length"]) - 20))
    told = cli("views", "-w", workspace.root, "--view-px", 32, "--tiles", 4, "--output", tmp_path / "sheet.png")
    assert told.code == 0, told.err
    assert "1 of 4 tiles are damaged and left out" in told.err
    assert "3 tiles" in told.err
