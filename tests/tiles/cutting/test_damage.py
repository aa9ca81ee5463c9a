"""Silent damage: bytes put in, swapped, flipped or zeroed in every kind of TIFF. A tile that is kept is the slide's.

What cannot be known is named in UNKNOWABLE: pixels without a checksum on a slide of a single level.
"""

import io
import shutil
import zipfile
import zlib
from contextlib import closing

import numpy as np
import pytest
import tifffile
from PIL import Image

from histossl.core.config import TileConfig, TissueConfig
from histossl.core.errors import SlideError
from histossl.core.workspace import Workspace
from histossl.demo.paint import paint_slide
from histossl.slides.reading.slide import open_slide
from histossl.slides.reading.tifffile_backend import TiffLevels
from histossl.tiles.cutting.comparison import Comparison, block_means, blocks_along
from histossl.tiles.cutting.cutter import cutter_for
from histossl.tiles.cutting.native_jpeg import DamagedTile, Splicer
from histossl.tiles.cutting.tile_slide import TileJob, tile_slide
from histossl.tiles.store.index import find_zips
from histossl.tiles.tiling import tile_archive

SIDE = 768
WRONG = 10  # grey levels between a tile and the original's, in the mean: JPEG noise is below 2
ALL = TissueConfig(min_tissue=0, min_sharpness=0, min_saturation=0, max_fold=1, max_ink=1)
SCALE = {"resolutionunit": "CENTIMETER", "metadata": None, "photometric": "rgb"}
KINDS = {
    "uncompressed strips": {"rowsperstrip": 64},
    "uncompressed tiles": {"tile": (256, 256)},
    "LZW strips": {"rowsperstrip": 64, "compression": "lzw"},
    "LZW tiles": {"tile": (256, 256), "compression": "lzw", "predictor": True},
    "PackBits strips": {"rowsperstrip": 64, "compression": "packbits"},
    "deflate tiles": {"tile": (256, 256), "compression": "zlib"},
    "JPEG tiles": {"tile": (256, 256), "compression": "jpeg", "compressionargs": {"level": 85}},
    "JPEG strips": {"rowsperstrip": 64, "compression": "jpeg", "compressionargs": {"level": 85}},
    "JPEG 2000 tiles": {"tile": (256, 256), "compression": 34712, "compressionargs": {"level": 70}},
}
DAMAGES = ("insert", "swap", "flip", "zero", "cut")
# JPEG: a flipped bit shifts colours and ends as it should. JPEG 2000: its decoder makes something of anything.
# Uncompressed: swapped bytes are pixels, too.
UNKNOWABLE = {"JPEG tiles", "JPEG strips", "JPEG 2000 tiles", "uncompressed tiles", "uncompressed strips"}


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    path = tmp_path_factory.mktemp("truth") / "A1.tif"
    paint_slide(path, width_px=SIDE, height_px=SIDE, mpp=0.5, compression="deflate", pyramid=False, seed=3)
    with open_slide(path) as slide:
        return slide.read_level(0, 0, 0, SIDE, SIDE)


def write(path, pixels, levels=1, **kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            image = np.asarray(Image.fromarray(pixels).reduce(4**level)) if level else pixels
            resolution = (20000 / 4**level,) * 2
            tiff.write(image, subfiletype=int(level > 0), resolution=resolution, **SCALE, **kind)
    return path


def mutated(content, damage, seed):
    """The file with one damage behind its first directory; the same for the same seed."""
    rng = np.random.default_rng([seed, zlib.crc32(damage.encode())])
    changed = bytearray(content)
    size = len(changed)
    at = int(rng.integers(600, size - 600))
    if damage == "insert":
        changed[at:at] = rng.integers(0, 256, int(rng.integers(1, 9)), dtype=np.uint8).tobytes()
    elif damage == "swap":
        length = int(rng.integers(16, 4097))
        one, other = sorted(int(each) for each in rng.integers(600, size - length, 2))
        if other < one + length:
            other = min(one + length, size - length)
        changed[one : one + length], changed[other : other + length] = (
            changed[other : other + length],
            changed[one : one + length],
        )
    elif damage == "flip":
        changed[at] ^= 1 << int(rng.integers(8))
    elif damage == "zero":
        changed[at : at + 64] = bytes(64)
    else:
        del changed[-int(rng.integers(1, size // 3)) :]
    assert damage in ("insert", "cut") or len(changed) == size
    return bytes(changed)


def tiled(path, workspace, tile_px):
    """The slide's row and its tiles by name."""
    (row,) = tile_archive(path.parent, workspace, TileConfig(tile_px=tile_px, tissue=ALL), 0)
    tiles = {}
    for zip_path in find_zips(workspace.tiles):
        with zipfile.ZipFile(zip_path) as archive:
            for name in archive.namelist():
                if name.endswith(".jpg"):
                    tiles[name] = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")).astype(int)
    return row, tiles


def silently_wrong(tmp_path, source, tile_px, seeds):
    """(damage, seed) of the mutants that are ok and have a tile that is not the original's; how many were rescued."""
    row, good = tiled(source, Workspace(tmp_path / "whole"), tile_px)
    assert row.status == "ok", row
    assert row.verified
    silent = []
    for damage in DAMAGES:
        for seed in range(seeds):
            folder = tmp_path / f"{damage}-{seed}"
            (folder / "slides").mkdir(parents=True)
            path = folder / "slides" / source.name
            path.write_bytes(mutated(source.read_bytes(), damage, seed))
            row, tiles = tiled(path, Workspace(folder / "ws"), tile_px)
            wrong = [name for name, tile in tiles.items() if np.abs(tile - good[name]).mean() > WRONG]
            assert row.reason or row.status == "ok"
            if wrong and row.status == "ok":
                silent.append((damage, seed))
            shutil.rmtree(folder)
    return silent


@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_tile_of_a_pyramid_is_kept_without_a_word(tmp_path, truth, kind):
    source = write(tmp_path / "slides" / "A1.tif", truth, levels=2, **KINDS[kind])
    silent = silently_wrong(tmp_path, source, 224, seeds=1 if "strips" in kind else 2)
    # JPEG 2000 may lose its detail alone: the colours of the blocks stay.
    assert len(silent) <= (1 if kind == "JPEG 2000 tiles" else 0), silent


def test_no_damaged_copy_of_a_pyramid_is_kept_without_a_word(tmp_path, truth):
    source = write(tmp_path / "slides" / "A1.tif", truth, levels=2, **KINDS["JPEG tiles"])
    assert silently_wrong(tmp_path, source, 256, seeds=4) == []


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_single_level_only_what_cannot_be_known_is_kept(tmp_path, truth, kind):
    source = write(tmp_path / "slides" / "A1.tif", truth, **KINDS[kind])
    silent = silently_wrong(tmp_path, source, 224, seeds=1 if "strips" in kind else 2)
    assert len(silent) <= (1 if kind in UNKNOWABLE else 0), silent
    assert not {damage for damage, _ in silent} & {"insert", "zero", "cut"}, silent


@pytest.mark.slow
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_twelve_of_each_damage(tmp_path, truth, kind, levels):
    source = write(tmp_path / "slides" / "A1.tif", truth, levels=levels, **KINDS[kind])
    silent = silently_wrong(tmp_path, source, 224, seeds=12)
    print(kind, levels, silent)
    assert len(silent) <= (6 if kind in UNKNOWABLE and levels == 1 else 1), silent


# ---- single cases


def test_every_bit_flipped_in_a_copied_tile_is_found_where_it_shows(tmp_path, truth):
    """Whatever a decoder says: what is kept differs by less than a few grey levels."""
    source = write(tmp_path / "slides" / "A1.tif", truth, levels=2, **KINDS["JPEG tiles"])
    row, good = tiled(source, Workspace(tmp_path / "whole"), 256)
    assert (row.tile_way, row.verified) == ("copied", "decoded, against level 1")
    with tifffile.TiffFile(source) as tiff:
        offset, count = tiff.pages[0].dataoffsets[4], tiff.pages[0].databytecounts[4]
    path = tmp_path / "mutant" / "A1.tif"
    path.parent.mkdir()
    found = 0
    for number in range(16):
        content = bytearray(source.read_bytes())
        content[offset + 200 + (count - 220) * number // 16] ^= 1 << number % 8
        path.write_bytes(content)
        workspace = Workspace(tmp_path / f"ws{number}")
        row, tiles = tiled(path, workspace, 256)
        assert max(np.abs(tile - good[name]).mean() for name, tile in tiles.items()) < 6
        found += len(tiles) < len(good)
    assert found >= 5


def test_without_verify_nothing_is_compared_and_the_row_says_so(tmp_path, truth):
    source = write(tmp_path / "slides" / "A1.tif", truth, levels=2, **KINDS["JPEG tiles"])
    config = TileConfig(tile_px=256, tissue=ALL)
    job = TileJob(source, "A1", "A1.tif", tmp_path / "A1.zip", config, verify=False)
    assert tile_slide(job, lambda _: None).tiling["verified"] == "sample"


def test_a_damaged_coarser_level_costs_no_tile_where_a_third_one_is_there(tmp_path, truth):
    source = write(tmp_path / "slides" / "A1.tif", truth, levels=3, tile=(64, 64))
    with tifffile.TiffFile(source) as tiff:
        page = tiff.pages[1]
        content = bytearray(source.read_bytes())
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            content[offset : offset + count // 2] = bytes([40]) * (count // 2)
    source.write_bytes(content)
    row, tiles = tiled(source, Workspace(tmp_path / "ws"), 256)
    assert len(tiles) == row.num_tiles == 9
    assert row.rejected_damaged == 0


def test_levels_that_are_not_made_of_one_another_are_not_compared(tmp_path, truth):
    source = write(tmp_path / "slides" / "A1.tif", truth, levels=2, tile=(64, 64))
    with tifffile.TiffFile(source) as tiff:
        page = tiff.pages[1]
        content = bytearray(source.read_bytes())
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            content[offset : offset + count] = bytes(255 - one for one in content[offset : offset + count])
    source.write_bytes(content)
    row, tiles = tiled(source, Workspace(tmp_path / "ws"), 256)
    assert len(tiles) == 9
    assert row.rejected_damaged == 0


@pytest.mark.parametrize(("tile_px", "coarse_px", "blocks"), [(256, 64, 8), (224, 56, 7), (240, 60, 6), (256, 16, 4)])
def test_blocks_are_whole_pixels_of_the_tile_and_several_of_the_coarser_level(tile_px, coarse_px, blocks):
    assert blocks_along(tile_px, coarse_px) == blocks


def test_block_means_are_means(truth):
    tile = np.ascontiguousarray(truth[:256, :256])
    means = tile.reshape(8, 32, 8, 32, 3).mean((1, 3))
    assert np.abs(block_means(tile, 8) - means).max() < 2
    painted = np.dstack([tile[..., ::-1], np.full((256, 256), 255, np.uint8)])  # as OpenSlide paints it
    assert np.array_equal(block_means(painted, 8), block_means(tile, 8))
    assert np.array_equal(block_means(np.hstack([tile, tile]), 8)[:, 8:], block_means(tile, 8))


@pytest.mark.data
def test_no_tile_of_a_real_slide_is_taken_for_damaged(real_data):
    slides = real_data / "slides"
    few = sorted((real_data / "colon" / "slides").glob("*.tif"))[::8]
    for path, mpp, tile_px in [*((one, 0.5, 224) for one in few), (slides / "TCGA-CR-7395-01A-01-TS1.svs", 0.25, 224)]:

        def open_again(path=path):
            return open_slide(path, None if "colon" in path.parts else 0.25)

        with open_again() as slide:
            cutter = cutter_for(slide, mpp, TileConfig(tile_px=tile_px, mpp=mpp), open_again)
            places = np.arange(cutter.grid.num_places)
            comparison = Comparison(slide, cutter, open_again, places)
            assert comparison.level == 1
            assert not any(comparison.differs(place, cutter.pixels(place)) for place in places.tolist()), path
            assert comparison.compared == len(places)
            comparison.close()
            cutter.source.close()


# ---- what a format knows of itself


def test_a_run_of_zeros_in_a_jpeg_tile_is_damage(tmp_path, truth):
    source = write(tmp_path / "A1.tif", truth, **KINDS["JPEG tiles"])
    with open_slide(source) as slide:
        level = slide.native[0]
    tile = bytearray(source.read_bytes()[level.offsets[4] : level.offsets[4] + level.byte_counts[4]])
    Splicer(level).whole(bytes(tile))
    middle = len(tile) // 2
    tile[middle : middle + 64] = bytes(64)
    for asked in (Splicer(level).whole, Splicer(level).to_decode):
        with pytest.raises(DamagedTile, match="zeros"):
            asked(bytes(tile))


def test_flat_tiles_may_be_written_as_zeros(tmp_path):
    """An encoder that makes its own Huffman tables writes blocks without content as zeros."""
    flat = np.full((256, 256, 3), 243, np.uint8)
    flat[:8, :8] = np.arange(192).reshape(8, 8, 3)
    buffer = io.BytesIO()
    Image.fromarray(flat).save(buffer, "JPEG", quality=90, optimize=True)
    assert bytes(64) in buffer.getvalue()
    source = write(tmp_path / "A1.tif", flat, **KINDS["JPEG tiles"])
    with open_slide(source) as slide:
        level = slide.native[0]
    Splicer(level).whole(buffer.getvalue())


@pytest.mark.parametrize("compression", ["lzw", "packbits"])
def test_a_strip_that_unpacks_to_too_much_is_damaged(tmp_path, truth, compression):
    """Its content is another, longer strip's: whole, but not this one's."""
    path = write(tmp_path / "A1.tif", truth, rowsperstrip=64, compression=compression)
    longer = write(tmp_path / "B1.tif", truth, rowsperstrip=65, compression=compression)
    with tifffile.TiffFile(path) as tiff, tifffile.TiffFile(longer) as other:
        page, theirs = tiff.pages[0], other.pages[0]
        content = longer.read_bytes()[theirs.dataoffsets[0] :][: theirs.databytecounts[0]]
        tags = {"at": page.tags[273].valueoffset, "count": page.tags[279].valueoffset}
        sizes = {name: page.tags[tag].dtype for name, tag in (("at", 273), ("count", 279))}
    assert all(int(one) in (3, 4) for one in sizes.values())
    data = bytearray(path.read_bytes())
    end = len(data)
    data += content
    data[tags["at"] : tags["at"] + 4] = end.to_bytes(4, "little")
    width = 2 if int(sizes["count"]) == 3 else 4
    data[tags["count"] : tags["count"] + width] = len(content).to_bytes(width, "little")
    path.write_bytes(data)
    with open_slide(path) as slide, pytest.raises(SlideError, match=r"unpacks to|TOO_SMALL"):
        slide.read_level(0, 0, 0, 64, 64)


def test_tiles_that_share_their_bytes_on_purpose_are_no_damage_and_those_that_overlap_are(tmp_path, truth):
    path = write(tmp_path / "A1.tif", truth, tile=(64, 64))
    with tifffile.TiffFile(path) as tiff:
        table = tiff.pages[0].tags[324].valueoffset
        first, _, third = (int(each) for each in tiff.pages[0].dataoffsets[:3])
    content = bytearray(path.read_bytes())
    content[table + 4 : table + 8] = first.to_bytes(4, "little")
    path.write_bytes(content)
    with closing(TiffLevels(path)) as levels:
        assert np.array_equal(levels.read_level(0, 64, 0, 64, 64), truth[:64, :64])
    content[table + 4 : table + 8] = (third + 999).to_bytes(4, "little")
    path.write_bytes(content)
    with closing(TiffLevels(path)) as levels, pytest.raises(SlideError, match="lies in another"):
        levels.read_level(0, 64, 0, 64, 64)


def test_bytes_put_into_uncompressed_pixels_are_told_in_the_row(tmp_path, truth):
    source = write(tmp_path / "slides" / "A1.tif", truth, rowsperstrip=64)
    content = source.read_bytes()
    source.write_bytes(content[:50_000] + b"x" + content[50_000:])
    row, _ = tiled(source, Workspace(tmp_path / "ws"), 224)
    assert row.status == "warning"
    assert "belong to nothing" in row.reason
    source.write_bytes(content + bytes(16))
    assert tiled(source, Workspace(tmp_path / "padded"), 224)[0].status == "ok"


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_flipped_bit_in_a_plain_image_is_found(tmp_path, truth, suffix):
    path = tmp_path / f"A1.{suffix}"
    Image.fromarray(truth).save(path, quality=85)
    with open_slide(path, 0.5) as slide:
        slide.read_level(0, 0, 0, 64, 64)
    content = bytearray(path.read_bytes())
    if suffix == "png":
        content[len(content) // 2] ^= 1
    else:
        content[len(content) // 2 : len(content) // 2 + 300] = b"\xff\xd3" * 150  # restart markers where none belong
    path.write_bytes(content)
    with open_slide(path, 0.5) as slide, pytest.raises(SlideError, match="damaged"):
        slide.read_level(0, 0, 0, 64, 64)
