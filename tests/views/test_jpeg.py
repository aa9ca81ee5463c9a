"""JPEG as tensor ops against the two libraries that make real ones, and that it neither waits nor minds its company."""

from io import BytesIO

import numpy as np
import pytest
import simplejpeg
import tifffile
import torch
from PIL import Image, features

from histossl.views.jpeg import recompressed


@pytest.fixture(scope="module")
def tissue(painted_slide):
    pixels = torch.from_numpy(tifffile.imread(painted_slide.path, key=0)).permute(2, 0, 1)

    def cut(side, count=8):
        starts = np.random.default_rng(side).integers(200, 800 - side, (count, 2))
        return torch.stack([pixels[:, y : y + side, x : x + side] for y, x in starts])

    return cut


def noise(side, count=8):
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(side)).byte()


def by_pillow(tile, quality):
    file = BytesIO()
    Image.fromarray(tile.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=int(quality), subsampling="4:2:0")
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def by_simplejpeg(tile, quality):
    jpeg = simplejpeg.encode_jpeg(
        np.ascontiguousarray(tile.permute(1, 2, 0).numpy()), int(quality), colorsubsampling="420"
    )
    return torch.from_numpy(simplejpeg.decode_jpeg(jpeg)).permute(2, 0, 1)


def each(by, tiles, quality):
    return torch.stack([by(tile, q) for tile, q in zip(tiles, quality, strict=True)])


@pytest.mark.skipif(not features.check_feature("libjpeg_turbo"), reason="Pillow is built with another libjpeg")
@pytest.mark.parametrize("side", [16, 96, 97, 98, 100, 224])
def test_it_is_pillows_jpeg_to_the_bit(tissue, side):
    quality = np.array([1, 10, 30, 49, 50, 75, 95, 100])
    black_and_white = (noise(side) > 127).byte() * 255
    for tiles in (tissue(side), noise(side), black_and_white):
        assert torch.equal(recompressed(tiles, quality), each(by_pillow, tiles, quality))


@pytest.mark.parametrize("side", [96, 100, 224])
def test_it_is_simplejpegs_but_for_its_coarser_dct_below_quality_96(tissue, side):
    tiles = tissue(side)
    best = np.array([96, 97, 98, 99, 100, 100, 98, 96])
    assert torch.equal(recompressed(tiles, best), each(by_simplejpeg, tiles, best))
    quality = np.array([30, 40, 50, 60, 70, 80, 90, 95])
    apart = (recompressed(tiles, quality).int() - each(by_simplejpeg, tiles, quality).int()).abs().float()
    assert apart.mean() < 1
    assert apart.mean((1, 2, 3)).max() < 1.5
    assert (apart > 8).float().mean() < 0.005


def test_lower_quality_is_further_from_the_tile(tissue):
    tiles = tissue(96, 1).expand(6, -1, -1, -1)
    error = (recompressed(tiles, np.array([95, 80, 60, 40, 20, 5])).int() - tiles.int()).abs().float().mean((1, 2, 3))
    assert (error.diff() > 0).all()


def test_a_flat_tile_stays_flat():
    colours = torch.tensor([[255, 255, 255], [0, 0, 0], [128, 128, 128], [214, 158, 199]], dtype=torch.uint8)
    flat = colours[:, :, None, None].expand(-1, -1, 50, 50)
    for quality, most in ((95, 2), (30, 8)):
        ours = recompressed(flat, np.full(4, quality))
        assert (ours == ours[:, :, :1, :1]).all()
        assert (ours.int() - flat.int()).abs().max() <= most


def test_a_tile_does_not_depend_on_its_batch_its_memory_or_autocast(tissue):
    tiles, quality = tissue(100), np.array([30, 40, 50, 60, 70, 80, 90, 95])
    whole = recompressed(tiles, quality)
    for row in range(8):
        assert torch.equal(recompressed(tiles[row : row + 1], quality[row : row + 1]), whole[row : row + 1])
    assert torch.equal(recompressed(tiles[3:].contiguous(memory_format=torch.channels_last), quality[3:]), whole[3:])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(recompressed(tiles, quality), whole)


def test_no_value_is_read_back():
    """A meta tensor has none: whatever waits for a value of a tile raises there."""
    tiles = torch.empty(5, 3, 100, 100, dtype=torch.uint8, device="meta")
    assert recompressed(tiles, np.full(5, 50)).shape == tiles.shape


@pytest.mark.gpu
def test_the_gpu_gives_the_same_bits_and_is_not_waited_for(tissue):
    tiles, quality = tissue(224), np.array([30, 40, 50, 60, 70, 80, 90, 95])
    there = tiles.cuda()
    recompressed(there, quality)  # cuBLAS takes its workspace
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.float16):
            ours = recompressed(there, quality)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.backends.cuda.matmul.allow_tf32 = allowed
    assert torch.equal(ours.cpu(), recompressed(tiles, quality))
