"""`scan` in a workspace that is tiled already says when its estimate is of other tiles."""

import pytest


@pytest.fixture
def tiled(workspace, paint, cli):
    folder = paint("A1.tif", mpp=0.5).path.parent
    told = cli("tile", folder, "-w", workspace.root, "--tile-px", 64, "--max-ink", 0.5, "--workers", 1)
    assert told.code == 0, told.err
    return folder


def said(told) -> str:
    assert told.code == 0, told.err
    return " ".join((told.out + told.err).split())


def test_an_estimate_of_other_tiles_than_there_are_is_told_as_such(workspace, tiled, cli):
    told = said(cli("scan", tiled, "-w", workspace.root, "--workers", 1, "--min-tissue", 0.25))
    assert "was tiled with other settings than this estimate is for: min-tissue was 0.5, now 0.25" in told


def test_the_settings_of_then_are_not_remarked_upon(workspace, tiled, cli):
    """What is left out is as it was tiled, as tile has it."""
    for more in ((), ("--tile-px", 64, "--max-ink", 0.5)):
        told = said(cli("scan", tiled, "-w", workspace.root, "--workers", 1, *more))
        assert "other settings" not in told
        assert "tiles of 64 px" in told


def test_a_workspace_without_tiles_is_not_compared(workspace, paint, cli):
    folder = paint("A1.tif", mpp=0.5).path.parent
    assert "other settings" not in said(cli("scan", folder, "-w", workspace.root, "--workers", 1))
