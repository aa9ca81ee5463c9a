"""Views as a whole: the papers' settings, measured rates, and the same views however the stream is cut."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import functional as TF

from histossl.bench.view_rates import MEAN, STD, SyntheticStore, reference_pipeline
from histossl.core.errors import UsageError
from histossl.tiles.stream.loader import decode_tiles
from histossl.views import colour
from histossl.views.recipe import (
    PRETEXT,
    RECIPES,
    ViewRecipe,
    ViewSpec,
    clean_view,
    make_views,
    normalise,
    planned,
    recipe_named,
    with_settings,
)
from histossl.views.rng import Draws

LEVEL = 1 / 255
NEUTRAL = ViewSpec(
    size_px=16, scale=(1, 1), ratio=(1, 1), mirror_p=0, jitter_p=0, grey_p=0, blur_p=0, stain_p=0, solarize_p=0
)


def tissue(count, side=48, seed=0, low=80, high=180):
    picture = torch.randint(low, high, (count, 3, side // 4, side // 4), generator=torch.Generator().manual_seed(seed))
    return picture.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8)


def one_view(tiles, view, seed=0, first=0):
    return make_views(tiles, ViewRecipe("test", (view,)), seed, torch.arange(first, first + len(tiles)))[0]


# ---- what the papers say


def test_the_recipes_are_the_papers():
    query, key = recipe_named("mocov2").views
    assert query == key
    assert (query.scale, query.jitter_p, query.grey_p, query.blur_p) == ((0.2, 1.0), 0.8, 0.2, 0.5)
    assert (query.brightness, query.contrast, query.saturation, query.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (query.blur_sigma, query.mirror_p, query.flip_p, query.stain_p) == ((0.1, 2.0), 0.5, 0, 0)
    v3 = recipe_named("mocov3").views
    assert [(v.scale, v.blur_p, v.solarize_p) for v in v3] == [((0.08, 1.0), 1.0, 0.0), ((0.08, 1.0), 0.1, 0.2)]
    v1 = recipe_named("mocov1").views[0]
    assert (v1.jitter_p, v1.hue, v1.grey_p, v1.blur_p) == (1.0, 0.4, 0.2, 0)
    simclr = recipe_named("simclr").views[0]
    assert (simclr.scale, simclr.brightness, simclr.saturation, simclr.hue) == ((0.08, 1.0), 0.8, 0.8, 0.2)
    dino = recipe_named("dino").views
    assert [view.size_px for view in dino] == [224, 224, *[96] * 8]
    assert [view.blur_p for view in dino] == [1.0, 0.1, *[0.5] * 8]
    assert [view.solarize_p for view in dino] == [0, 0.2, *[0] * 8]
    assert [view.scale for view in dino[1:3]] == [(0.25, 1.0), (0.05, 0.25)]
    assert {(view.saturation, view.hue, view.interpolation) for view in dino} == {(0.2, 0.1, "bicubic")}
    assert [view.scale for view in recipe_named("dinov2").views[1:3]] == [(0.32, 1.0), (0.05, 0.32)]
    assert [view.blur_p for view in recipe_named("dinov2").views[:3]] == [1.0, 0.1, 0.5]
    assert [view.blur_p for view in recipe_named("dinov2-released").views[:3]] == [0.0, 0.9, 0.5]


@pytest.mark.parametrize(
    "name",
    [
        f"{name}-histology"
        for name in RECIPES
        if name + "-histology" in RECIPES and name not in (*PRETEXT, "distillation")
    ],
)
def test_tissue_has_no_up_no_hue_and_no_negative_but_stains(name):
    for view in recipe_named(name).views:
        assert (view.flip_p, view.quarter_turns, view.hue, view.solarize_p) == (0.5, True, 0, 0)
        assert view.stain_p > 0.5
        assert view.stain_shift > 0
    plain = recipe_named(name.removesuffix("-histology"))
    assert [view.size_px for view in plain.views] == [view.size_px for view in recipe_named(name).views]
    assert [view.scale for view in plain.views] == [view.scale for view in recipe_named(name).views]


def test_sizes_are_parameters():
    assert [view.size_px for view in recipe_named("dino", 112).views[1:3]] == [112, 48]
    assert [view.size_px for view in recipe_named("dino", 98, local_px=42, num_local=2).views] == [98, 98, 42, 42]


def test_a_wrong_name_or_value_is_one_clear_line():
    with pytest.raises(UsageError, match="moco-v2: no such recipe, did you mean 'mocov2'"):
        recipe_named("moco-v2")
    with pytest.raises(UsageError, match=r"view setting grey_p = 1\.2: must be a probability"):
        ViewSpec(grey_p=1.2)
    with pytest.raises(UsageError, match="view setting scale"):
        ViewSpec(scale=(0.5, 0.2))
    with pytest.raises(UsageError, match="no view setting 'gray_p', did you mean 'grey_p'"):
        recipe_named("dino").with_all(gray_p=0.1)
    assert {view.grey_p for view in recipe_named("dino").with_all(grey_p=0.1).views} == {0.1}


# ---- the views


@pytest.mark.parametrize("name", RECIPES)
def test_views_have_their_sizes_and_lie_between_0_and_1(name):
    tiles = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    recipe = recipe_named(name, 48)
    views = make_views(tiles, recipe, 0, torch.arange(5))
    assert [tuple(view.shape) for view in views] == [(5, 3, spec.size_px, spec.size_px) for spec in recipe.views]
    for view in views:
        assert view.dtype == torch.float32
        assert view.min() >= 0
        assert view.max() <= 1
        assert view.flatten(1).std(1).min() > 0
    assert not views[0].is_inference()  # can be trained on


@pytest.mark.parametrize("name", ["mocov2", "mocov2-histology", "dinov2-histology"])
def test_views_are_the_same_on_1_2_and_4_processes_and_after_a_resume(name):
    tiles, recipe, positions = tissue(40), recipe_named(name, 32), torch.arange(1_000_000, 1_000_040)
    whole = make_views(tiles, recipe, 7, positions)
    for parts in (2, 4):
        cut = zip(tiles.chunk(parts), positions.chunk(parts), strict=True)
        shared = [make_views(some, recipe, 7, place) for some, place in cut]
        for number, view in enumerate(whole):
            assert torch.equal(view, torch.cat([views[number] for views in shared]))
    for number, view in enumerate(make_views(tiles[33:34], recipe, 7, positions[33:34])):
        assert torch.equal(whole[number][33:34], view)


def test_views_of_one_tile_differ_by_view_position_and_seed():
    tiles, recipe = tissue(1).expand(3, -1, -1, -1), recipe_named("mocov2-histology", 32)
    query, key = make_views(tiles, recipe, 0, torch.arange(3))
    other, _ = make_views(tiles, recipe, 1, torch.arange(3))
    for one, two in ((query, key), (query, other), (query[:2], query[1:])):
        assert ((one - two).abs().mean((1, 2, 3)) > 2 * LEVEL).all()


def test_leaving_one_op_out_leaves_the_others_as_they_were():
    view, draws = recipe_named("mocov2-histology").views[0], Draws(0, np.arange(50), 0)
    with_it, without = planned(view, draws, 256), planned(replace(view, grey_p=0, stain_p=0), draws, 256)
    assert (with_it.where.top == without.where.top).all()
    assert (with_it.where.turns == without.where.turns).all()
    assert (with_it.blur_sigma == without.blur_sigma).all()
    assert (with_it.colour != without.colour).any()


def test_a_neutral_recipe_gives_the_tile_itself():
    tiles = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert (one_view(tiles, NEUTRAL) - tiles.float() / 255).abs().max() < 1e-5
    channels_last = tiles.contiguous(memory_format=torch.channels_last)  # as the decoder leaves them
    recipe = recipe_named("mocov2-histology", 16)
    for one, two in zip(*(make_views(x, recipe, 0, torch.arange(20)) for x in (tiles, channels_last)), strict=True):
        assert torch.equal(one, two)


def test_a_whole_view_is_torchvisions_chain_with_the_same_numbers():
    tiles = tissue(30, side=64, low=100, high=160)
    ops = {"brightness": 0.15, "contrast": 0.3, "saturation": 0.3, "hue": 0.0, "jitter_p": 1.0}
    view = ViewSpec(size_px=40, scale=(0.2, 1), grey_p=0.3, flip_p=0.5, solarize_p=0.3, **ops)
    ours, draws = one_view(tiles, view, seed=3), Draws(3, np.arange(30), 0)
    plan = planned(view, draws, 64)
    grey = draws.happens("grey", 0.3)
    where, error = plan.where, []
    for n in range(30):
        box = [int(edge[n]) for edge in (where.top, where.left, where.height, where.width)]
        x = TF.resized_crop(tiles[n].float() / 255, *box, [40, 40], antialias=True)
        x = TF.hflip(x) if where.mirror[n] else x
        x = TF.vflip(x) if where.flip[n] else x
        x = TF.adjust_brightness(x, draws.one("brightness", 0.85, 1.15)[n])
        x = TF.adjust_contrast(x, draws.one("contrast", 0.7, 1.3)[n])
        x = TF.adjust_saturation(x, draws.one("saturation", 0.7, 1.3)[n])
        x = TF.rgb_to_grayscale(x, 3) if grey[n] else x
        x = TF.gaussian_blur(x, 17, plan.blur_sigma[n]) if plan.blur_sigma[n] else x
        same = (x - 128 / 255).abs() > 1e-4  # a hair from the threshold, rounding decides
        x = TF.solarize(x, 128 / 255) if plan.solarize[n] else x
        error.append(float(((ours[n] - x).abs() * same).mean()))
    assert np.mean(error) < 0.1 * LEVEL
    assert max(error) < LEVEL
    assert 0 < grey.sum() < 30
    assert 0 < plan.solarize.sum() < 30


# ---- measured rates: what came out, not what was asked for

COUNT = 3000


def ramp(count=COUNT):
    """Colour that grows to the right and, less so, downwards: every mirror image of it is another one."""
    x, y = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="xy")
    return torch.stack([100 + 6 * x + y, 90 + 2 * x + 3 * y, 60 + x + 4 * y]).to(torch.uint8).expand(count, -1, -1, -1)


def assert_rate(happened, probability):
    """Within 4 standard deviations of a binomial."""
    spread = np.sqrt(len(happened) * probability * (1 - probability))
    assert abs(int(happened.sum()) - len(happened) * probability) <= 4 * spread + 1e-9


@pytest.mark.parametrize("name", ["mocov2", "mocov1", "dino", "dinov2-released", "mocov2-histology", "simclr"])
@pytest.mark.parametrize("number", [0, 1])
def test_ops_happen_as_often_as_the_recipe_says(name, number):
    view, tiles = recipe_named(name, 16).views[number], ramp()
    same = tiles.float() / 255

    def only(**settings):
        return one_view(tiles, replace(NEUTRAL, **settings), seed=number)

    grey = only(grey_p=view.grey_p)
    assert_rate((grey.amax(1) - grey.amin(1)).amax((1, 2)) < 1e-4, view.grey_p)
    blurry = only(blur_p=view.blur_p, blur_sigma=(0.5, 2.0))
    assert_rate((blurry - same).abs().amax((1, 2, 3)) > 1e-4, view.blur_p)
    negative = only(solarize_p=view.solarize_p)
    assert_rate((negative - same).abs().amax((1, 2, 3)) > 0.1, view.solarize_p)
    jittered = only(jitter_p=view.jitter_p)
    assert_rate((jittered - same).abs().amax((1, 2, 3)) > 1e-4, view.jitter_p)
    stained = only(stain_p=view.stain_p, stain_shift=view.stain_shift, stain_scale=view.stain_scale)
    assert_rate((stained - same).abs().amax((1, 2, 3)) > 1e-4, view.stain_p)
    mirrored = only(mirror_p=view.mirror_p)
    assert_rate(mirrored[:, 0, 0, 0] > mirrored[:, 0, 0, -1], view.mirror_p)
    flipped = only(flip_p=view.flip_p)
    assert_rate(flipped[:, 2, 0, 0] > flipped[:, 2, -1, 0], view.flip_p)
    turned = only(quarter_turns=view.quarter_turns)
    for turns in range(4):
        wanted = 0.25 if view.quarter_turns else float(turns == 0)
        assert_rate((turned - torch.rot90(same, turns, (2, 3))).abs().amax((1, 2, 3)) < 1e-4, wanted)


def test_strengths_fill_their_ranges_evenly():

    tiles = ramp()
    grey = tiles[:, :1].expand(-1, 3, -1, -1).contiguous()
    bright = one_view(grey, replace(NEUTRAL, jitter_p=1, brightness=0.3, contrast=0, saturation=0, hue=0))
    factor = (bright.mean((1, 2, 3)) / (grey[0].float().mean() / 255)).numpy()
    assert stats.kstest(factor, stats.uniform(0.7, 0.6).cdf).pvalue > 1e-3
    flat = torch.full((COUNT, 3, 16, 16), 120, dtype=torch.uint8)
    moved = one_view(flat, replace(NEUTRAL, stain_p=1, stain_shift=0.05)).double().log() - np.log(120 / 255)
    # ln RGB moves by a sum of three normal shifts, each by its stain's density in that channel.
    density = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    for channel in range(3):
        spread = 0.05 * np.sqrt((density[:, channel] ** 2).sum())
        assert stats.kstest(moved[:, channel, 0, 0].numpy(), stats.norm(0, spread).cdf).pvalue > 1e-3


def test_jpeg_happens_to_its_share_before_the_crop():
    tiles = tissue(200, side=16, low=0, high=255)
    views = one_view(tiles, replace(NEUTRAL, jpeg_p=0.3, jpeg_quality=(10, 30)))
    assert_rate((views - tiles.float() / 255).abs().amax((1, 2, 3)) > 2 * LEVEL, 0.3)
    levels = views * 255  # a crop of the whole tile keeps the bytes that JPEG left
    assert (levels - levels.round()).abs().max() < 1e-3


def test_free_rotation_turns_by_any_angle_up_to_its_limit():
    tiles = ramp(200)
    views = one_view(tiles, replace(NEUTRAL, rotation_deg=30))
    slope_x, slope_y = (views[:, 0, 4:12, 4:12].diff(dim=axis).mean((1, 2)) for axis in (2, 1))
    degrees = torch.rad2deg(torch.atan2(slope_x, slope_y)) - float(np.rad2deg(np.arctan2(6, 1)))
    assert degrees.abs().max() < 32
    assert degrees.max() > 20
    assert degrees.min() < -20


def test_normalise_is_torchvisions():
    x, mean, std = torch.rand(2, 3, 4, 4), (0.7, 0.54, 0.66), (0.22, 0.26, 0.21)
    assert torch.allclose(normalise(x, mean, std), TF.normalize(x, list(mean), list(std)), atol=1e-6)
    tiles, recipe = tissue(6), recipe_named("mocov2", 32)
    plain, normalised = (make_views(tiles, recipe, 0, torch.arange(6), how) for how in (None, (mean, std)))
    for one, two in zip(plain, normalised, strict=True):
        assert torch.allclose(normalise(one, mean, std), two, atol=1e-6)


@pytest.mark.parametrize("size_px", [17, 48, 64, 80])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_clean_view_is_pillows_resize_whatever_the_memory(size_px, memory):
    tiles, mean, std = tissue(12, 64), (0.7, 0.54, 0.66), (0.22, 0.26, 0.21)
    plain = clean_view(tiles.contiguous(memory_format=memory), size_px)
    for tile, view in zip(tiles, plain, strict=True):
        wanted = TF.to_tensor(TF.to_pil_image(tile).resize((size_px, size_px), Image.Resampling.BILINEAR))
        assert (view - wanted).abs().max() < 1.01 * LEVEL
        assert (view - wanted).abs().mean() < 0.1 * LEVEL
    assert torch.allclose(clean_view(tiles, size_px, (mean, std)), normalise(plain, mean, std), atol=1e-6)


def test_tiles_that_are_no_tiles_are_our_own_mistake():
    with pytest.raises(ValueError, match="must be uint8"):
        make_views(torch.rand(2, 3, 8, 8), recipe_named("mocov2"), 0, torch.arange(2))


def test_views_are_made_in_whole_float32_whatever_the_run_computes_in(monkeypatch):
    seen = []
    recoloured = colour.recoloured

    def watched(*given):
        seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return recoloured(*given)

    monkeypatch.setattr(colour, "recoloured", watched)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            make_views(tissue(2, 32), recipe_named("mocov2", 32), 0, torch.arange(2))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {("highest", False)}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mocov2", "mocov2-histology", "dino", "simclr"])
def test_views_on_the_gpu_are_those_of_the_cpu(name):
    tiles, positions = tissue(24, 64), torch.arange(24)
    recipe = recipe_named(name, 48).with_all(rotation_deg=20.0, jpeg_p=0.2)
    here, there = (make_views(x, recipe, 0, positions) for x in (tiles, tiles.cuda()))
    for one, two in zip(here, there, strict=True):
        apart = (one - two.cpu()).abs()
        assert apart.mean() < 1e-3 * LEVEL or apart.quantile(0.999) < 1e-4  # solarize flips at its very threshold


def test_mocos_views_are_distributed_as_those_of_its_own_loader():
    """End to end against Pillow and torchvision with their own random numbers: brightness, contrast, grain, colour."""
    count, store = 500, SyntheticStore(64, 50)
    random.seed(0)
    torch.manual_seed(0)
    jpegs = [store.read(number % 50) for number in range(count)]
    theirs = torch.stack([reference_pipeline(32)(jpeg)[0] for jpeg in jpegs])
    ours = normalise(
        make_views(decode_tiles(jpegs, 64), recipe_named("mocov2", 32), 0, torch.arange(count))[0], MEAN, STD
    )
    for what in (
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.mean(1).std((1, 2)),
        lambda x: x.mean(1).diff(dim=2).abs().mean((1, 2)),
        lambda x: (x * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).std(1).mean((1, 2)),
    ):
        mine, other = (what(x).round(decimals=4).numpy() for x in (ours, theirs))
        assert stats.ks_2samp(mine, other).pvalue > 1e-3


def test_cores_share_a_batch_without_changing_it():
    tiles, recipe = tissue(20, 64), recipe_named("mocov2-histology", 224)  # five tiles a chunk
    before, made = torch.get_num_threads(), []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            made.append(make_views(tiles, recipe, 0, torch.arange(20)))
            assert torch.get_num_threads() == num_threads
        with torch.inference_mode():
            made.append(make_views(tiles, recipe, 0, torch.arange(20)))
    finally:
        torch.set_num_threads(before)
    for other in made[1:]:
        assert all(torch.equal(one, two) for one, two in zip(made[0], other, strict=True))
    assert not any(view.is_inference() or view.requires_grad for view in made[1])


def test_every_setting_of_a_view_can_be_asked_for():
    asked = with_settings(
        recipe_named("dino"), ["jpeg-p=0.5", "scale=0.4,1", "quarter_turns=true", "jpeg_quality=30,60"]
    )
    for view in asked.views:
        assert (view.jpeg_p, view.scale, view.quarter_turns, view.jpeg_quality) == (0.5, (0.4, 1.0), True, (30, 60))
    for wrong, said in (
        ("gray_p=0.1", "did you mean 'grey_p'"),
        ("scale=0.4", "must be two numbers, low,high"),
        ("jpeg_p=2", "must be a probability"),
        ("size_px=64", "there is no 'size_px'"),
        ("blur_p", "must be KEY=VALUE"),
    ):
        with pytest.raises(UsageError, match=said):
            with_settings(recipe_named("dino"), [wrong])
