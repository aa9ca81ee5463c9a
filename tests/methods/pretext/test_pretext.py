"""Pretext tasks: closed forms, guards, learning above chance, two processes as one (oracles 'Pretext').

The backbones have a few hundred weights.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_store import write_synthetic_store
from torch import Tensor, nn

from histossl.backbones.loading import load_backbone
from histossl.core.config import PretrainConfig, RuntimeConfig
from histossl.core.errors import UsageError
from histossl.core.workspace import PretrainDir, Workspace
from histossl.methods import classes_of, entry_of
from histossl.methods.method import Views
from histossl.methods.pretext.base import Layout, Pretext, cut, only_one_channel, standardised
from histossl.methods.pretext.colorization import (
    AB_LOW,
    AB_SIDE,
    Colorization,
    ColorizationConfig,
    Nearest,
    as_map,
    colour_loss,
    gamut_bins,
    grey,
    lab_of_rgb,
    prior_of,
    rebalancing,
    soft_encode,
)
from histossl.methods.pretext.context import Context, ContextConfig, apart, pairs
from histossl.methods.pretext.jigsaw import JigsawConfig, cells, far_orders, laid_out
from histossl.methods.pretext.rotation import in_all_turns
from histossl.runtime import collectives
from histossl.training.pretrain import pretrain
from histossl.views.recipe import make_views, recipe_named
from histossl.views.rng import Draws
from tests.runtime.test_collectives import on_two

TASKS = ("rotation", "context", "jigsaw", "colorization")
SIDE, DIM = 36, 16
SMALL: dict[str, dict[str, object]] = {
    "context": {"embedding_dim": 16, "hidden_dim": 32},
    "jigsaw": {"embedding_dim": 16, "num_orders": 6},
    "colorization": {"decoder_dim": 16, "prior_tiles": 32},
}


class Tiny(nn.Module):
    """What a timm CNN offers: a map, a pool, both together."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after in ((3, 12), (12, DIM)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), *([nn.BatchNorm2d(after)] if norm else []), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def forward_head(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def task(name: str, recipe: str = "", norm: bool = True, side: int = SIDE, **knobs: object) -> Pretext:
    method, config = classes_of(name)
    torch.manual_seed(0)
    return method(Tiny(norm), 2 * DIM, recipe_named(recipe or name, side), config(**{**SMALL.get(name, {}), **knobs}))


def oriented(count: int, seed: int = 0, side: int = SIDE) -> Tensor:
    """uint8 tiles with an up and a left: blue sky over a brown ground, a bright left over a dark right, grain."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.linspace(0, 1, side)[None, :, None]
    across = torch.linspace(0, 1, side)[None, None, :]
    lit = 0.75 - 0.3 * across + 0.12 * torch.rand(count, 1, 1, generator=generator)
    hue = (down > 0.4 + 0.2 * torch.rand(count, 1, 1, generator=generator)).float()
    stripes = 0.12 * torch.sin(down * 60) * hue + 0.12 * torch.sin(across * 60) * (1 - hue)
    light = lit * (0.9 - 0.5 * hue) + stripes
    rgb = torch.stack([light * (0.5 + 0.5 * hue), light * 0.75, light * (1 - 0.6 * hue)], 1)
    return ((rgb + 0.02 * torch.randn(rgb.shape, generator=generator)).clamp(0, 1) * 255).to(torch.uint8)


def noise(count: int, seed: int = 0) -> Tensor:
    shape = (count, 3, SIDE, SIDE)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def views_of(method: Pretext, tiles: Tensor, first: int = 0) -> Views:
    positions = torch.arange(first, first + len(tiles))
    images = make_views(tiles, method.views().with_all(mirror_p=0.0), 0, positions)
    return Views(images, positions, positions // 4, 0, positions_B=positions)


def trained(method: Pretext, tiles: Callable[[int, int], Tensor], steps: int, lr: float = 0.01) -> float:
    """Weighted accuracy on the last steps' fresh tiles (each is seen once, so none is learnt by heart)."""
    optimizer = torch.optim.AdamW(method.parameters(), lr=lr)
    method.train()
    if method.num_prefill_tiles():
        method.prefill(views_of(method, tiles(32, 999)))
    scores = []
    for step in range(steps):
        outcome = method(views_of(method, tiles(16, step), step * 16))
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        method.after_step([outcome.carry], step / steps)
        scores.append(float(outcome.metrics["pretext_accuracy"]))
    return float(np.mean(scores[-steps // 4 :]))


# ---- learning


@pytest.mark.parametrize(
    ("name", "steps", "above"),
    [("rotation", 40, 2.0), ("context", 60, 2.0), ("jigsaw", 60, 2.0), ("colorization", 40, 2.0)],
)
def test_oriented_tiles_are_told_far_better_than_by_chance(name: str, steps: int, above: float) -> None:
    method = task(name)
    accuracy, chance = trained(method, oriented, steps), float(method.chance)
    assert accuracy > above * chance
    assert f"against {chance:.1%} by chance" in method.verdict()


def test_rotation_of_noise_that_looks_alike_from_all_sides_stays_at_chance() -> None:
    method = task("rotation")
    assert trained(method, noise, 60, lr=0.003) == pytest.approx(0.25, abs=0.03)
    assert "no better than a guess" in method.verdict()


# ---- what all of them hold


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("recipe", ["", "-histology"])
def test_forward_twice_gives_the_same_loss_and_every_weight_learns(name: str, recipe: str) -> None:
    method = task(name, name + recipe).train()
    views = views_of(method, oriented(8))
    outcome = method(views)
    assert torch.equal(outcome.loss, method(views).loss)
    assert set(outcome.metrics) >= {"pretext_accuracy", "pretext_accuracy_recent", "chance"}
    outcome.loss.backward()
    assert [name for name, weight in method.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize(("name", "answers"), [("rotation", 4), ("context", 8), ("jigsaw", 6), ("colorization", 0)])
def test_a_head_that_tells_nothing_has_the_loss_of_its_ceiling(name: str, answers: int) -> None:
    method = task(name).train()
    last = {
        "rotation": lambda: method.head,
        "context": lambda: method.head[-1],
        "jigsaw": lambda: method.head,
        "colorization": lambda: method.decoder.last,
    }[name]()
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    outcome = method(views_of(method, oriented(8)))
    answers = answers or len(method.open_Q)
    assert outcome.loss.item() == pytest.approx(math.log(answers), rel=1e-5)
    assert method.loss_ceiling() == pytest.approx(math.log(answers), rel=1e-5)


def one_step(name: str) -> list[Tensor]:
    """Loss, gradient and state of a step with half of 8 tiles, or all of them in one process."""
    method = task(name).train()
    tiles = oriented(8)
    positions = collectives.own_part(torch.arange(8))
    images = make_views(collectives.own_part(tiles), method.views(), 0, positions)
    views = Views(images, positions, positions, 0, positions_B=positions)
    if method.num_prefill_tiles():
        method.prefill(views)
    outcome = method(views)
    outcome.loss.backward()
    method.after_step([outcome.carry], 0.5)
    grads = [collectives.mean_over_processes(weight.grad) for weight in method.parameters()]
    metrics = [collectives.mean_over_processes(outcome.metrics[name]) for name in ("pretext_accuracy", "chance")]
    return [collectives.mean_over_processes(outcome.loss), *metrics, *grads, *method.state_dict().values()]


def all_steps() -> list[list[Tensor]]:
    return [one_step(name) for name in TASKS]


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    alone = all_steps()
    for together in on_two(all_steps, tmp_path):
        for name, ours, theirs in zip(TASKS, together, alone, strict=True):
            for one, two in zip(ours, theirs, strict=True):
                torch.testing.assert_close(
                    one, two, rtol=2e-4, atol=1e-5, msg=lambda told, name=name: f"{name}: {told}"
                )


def test_recipes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="makes 2 views, and a pretext task takes 1"):
        task("jigsaw", "mocov2")
    with pytest.raises(UsageError, match=r"--recipe jigsaw-histology: flips or turns tiles.*use rotation"):
        task("rotation", "jigsaw-histology")
    with pytest.raises(UsageError, match=r"set gap 0\.1: must be more than twice the jitter"):
        ContextConfig(gap=0.1)
    with pytest.raises(UsageError, match="spread most: must be min or mean"):
        JigsawConfig(spread="most")
    with pytest.raises(UsageError, match="has no feature map"):
        Colorization(nn.Linear(2, 2), 2, recipe_named("colorization"), ColorizationConfig())


def test_chance_and_shortcut_are_named_with_their_causes() -> None:
    method = task("context")
    row = {"step": 400.0, "pretext_accuracy": 0.5, "pretext_accuracy_recent": 0.13, "chance": 0.125}
    assert "13.0% is no better than chance (12.5%)" in method.ailment(row)
    assert "ill-posed on tissue" in method.ailment(row)
    assert method.ailment({**row, "step": 20.0}) == ""  # too early to judge
    easy = method.ailment({**row, "step": 100.0, "pretext_accuracy_recent": 0.99})
    assert "likely a shortcut" in easy
    assert "JPEG grid" in easy
    assert method.ailment({**row, "pretext_accuracy_recent": 0.99}) == ""  # learnt, in its time
    assert all(classes_of(name)[0].caution for name in TASKS)


def test_recent_accuracy_is_that_of_the_last_steps() -> None:
    method = task("rotation")
    for _ in range(300):
        method.after_step([torch.tensor([32.0, 64.0]), torch.tensor([0.0, 64.0])], 0.5)
    right, asked = method.recent.tolist()
    assert right / asked == pytest.approx(0.25)
    assert method.verdict().startswith("Pretext accuracy (how a tile was turned, over the last steps): 25.0% against")


# ---- rotation


def test_turns_are_numbered_counter_clockwise_and_all_four_are_in_the_batch() -> None:
    image = torch.arange(4.0).view(1, 1, 2, 2)  # 0 1 / 2 3
    assert in_all_turns(image)[0, :, 0].flatten(1).tolist() == [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]


def test_one_turn_a_tile_is_drawn_by_the_tile() -> None:
    method = task("rotation", norm=False, all_turns=False)
    views = views_of(method, oriented(64))
    drawn = views.draws().whole("rotation", 4)
    assert np.bincount(drawn, minlength=4).min() > 8
    seen: list[Tensor] = []
    method.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    method(views)
    for number in range(8):
        assert torch.equal(seen[0][number], torch.rot90(views.images[0][number], int(drawn[number]), (1, 2)))


# ---- patches


@pytest.mark.parametrize("side", [32, 96, 224, 398])
def test_patches_lie_inside_and_apart(side: int) -> None:
    draws = Draws(0, np.arange(500), 0)
    for layout in (apart(side, 0.5, 7 / 96), cells(side)):
        corners = layout.corners(draws)
        assert corners.min() >= 0
        assert corners.max() + layout.patch_px <= side
        grid = corners.reshape(-1, 3, 3, 2)
        gaps = (
            np.concatenate([np.diff(grid[..., 0], axis=1).ravel(), np.diff(grid[..., 1], axis=2).ravel()])
            - layout.patch_px
        )
        assert gaps.min() >= layout.gap_px >= 1
    assert layout.reach_px == 0 or len(np.unique(corners[:, 0, 0])) > 1


def test_layouts_of_the_papers_come_out_as_printed() -> None:
    doersch = apart(398, 0.5, 7 / 96)  # three patches, two gaps, and the jitter at the edges
    assert (doersch.patch_px, doersch.pitch_px - doersch.patch_px, doersch.reach_px) == (96, 48, 14)
    assert doersch.gap_px == 48 - 14
    vissl = cells(255)
    assert (vissl.patch_px, vissl.pitch_px, vissl.reach_px, vissl.gap_px) == (64, 85, 20, 1)


def test_cut_patches_are_the_pixels_of_their_place() -> None:
    images = torch.arange(2 * 3 * 20 * 20).view(2, 3, 20, 20).float()
    corners = Layout(20, 4, 6, 2).corners(Draws(0, np.arange(2), 0))
    patches = cut(images, corners, 4)
    assert patches.shape == (2, 9, 3, 4, 4)
    for tile, number in ((0, 0), (1, 5), (1, 8)):
        top, left = corners[tile, number]
        assert torch.equal(patches[tile, number], images[tile, :, top : top + 4, left : left + 4])


def test_brightness_contrast_and_cast_tell_nothing_once_a_patch_is_standardised() -> None:
    patches = torch.rand(2, 9, 3, 8, 8)
    changed = 0.3 * patches + torch.tensor([0.1, 0.3, 0.5])[:, None, None]
    torch.testing.assert_close(standardised(patches), standardised(changed), rtol=1e-4, atol=1e-4)
    assert standardised(torch.ones(1, 1, 3, 8, 8)).abs().max() == 0  # glass


def test_a_patch_of_dropped_colours_keeps_one() -> None:
    kept, chosen = np.array([[0, 2, 1]]), np.array([[True, True, False]])
    left = only_one_channel(torch.ones(1, 3, 3, 2, 2), kept, chosen).amax((-1, -2))
    assert left.tolist() == [[[1, 0, 0], [0, 0, 1], [1, 1, 1]]]
    method = task("context", colour_drop=1.0)
    assert torch.isfinite(method(views_of(method, oriented(4))).loss)


def test_vit_gets_patches_that_its_own_divide() -> None:
    import timm

    vit = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    method = Context(vit, vit.num_features, recipe_named("context", 96), ContextConfig(hidden_dim=8, embedding_dim=8))
    assert (method.layout.patch_px, method.input_px) == (22, 16)
    fixed = timm.create_model("test_vit", num_classes=0, dynamic_img_size=False)
    with pytest.raises(UsageError, match="takes no patches of 16 or 32 px"):
        Context(fixed, vit.num_features, recipe_named("context", 96), ContextConfig())
    convnext = timm.create_model("test_convnext", num_classes=0)  # halves its image five times: 32 px at least
    assert Context(convnext, 64, recipe_named("context", 96), ContextConfig()).input_px == 32
    colour = Colorization(vit, vit.num_features, recipe_named("colorization", 64), ColorizationConfig(decoder_dim=8))
    loss = colour(views_of(colour, oriented(2, side=64))).loss
    loss.backward()
    assert torch.isfinite(loss)


# ---- context


def test_opposite_directions_sum_to_seven_and_number_the_ring_row_by_row() -> None:
    first, second, label = (each.tolist() for each in pairs())
    told = dict(zip(zip(first, second, strict=True), label, strict=True))
    assert [told[4, place] for place in (0, 1, 2, 3, 5, 6, 7, 8)] == list(range(8))
    assert all(told[b, a] == 7 - of for (a, b), of in told.items())
    assert np.bincount(label).tolist() == [2] * 8


# ---- jigsaw


def test_orders_are_different_far_apart_and_the_seeds_own() -> None:
    orders = far_orders(12)
    assert np.array_equal(np.sort(orders, 1), np.tile(np.arange(9), (12, 1)))
    apart_by = (orders[:, None] != orders[None]).sum(2)
    assert apart_by[~np.eye(12, dtype=bool)].min() >= 7
    assert (apart_by[:9, :9][~np.eye(9, dtype=bool)] == 9).all()  # nine orders can differ everywhere
    far_orders.cache_clear()
    assert np.array_equal(far_orders(12), orders)
    assert np.array_equal(far_orders(6), orders[:6])
    assert not np.array_equal(far_orders(12, seed=1), orders)


def test_an_order_is_undone_by_its_inverse() -> None:
    patches = torch.randn(3, 9, 3, 2, 2)
    orders = torch.from_numpy(far_orders(12)[:6].astype(np.int64)).view(3, 2, 9)
    shuffled = laid_out(patches, orders)
    assert torch.equal(shuffled[1, 1, 4], patches[1, orders[1, 1, 4]])
    for number in range(2):
        back = laid_out(shuffled[:, number], orders[:, number].argsort(1)[:, None])
        assert torch.equal(back[:, 0], patches)


def test_orders_belong_to_the_state() -> None:
    method, other = task("jigsaw"), task("jigsaw", order_seed=5)
    assert not torch.equal(method.orders_KN, other.orders_KN)
    other.load_state_dict(method.state_dict())
    assert torch.equal(method.orders_KN, other.orders_KN)


# ---- colorization


def test_lab_of_known_colours() -> None:
    rgb = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1], [0.5, 0.5, 0.5]])[:, :, None, None]
    lab = lab_of_rgb(rgb)[:, :, 0, 0]
    expected = torch.tensor([[100.0, 0, 0], [0, 0, 0], [53.24, 80.09, 67.2], [32.3, 79.19, -107.86], [53.39, 0, 0]])
    torch.testing.assert_close(lab, expected, rtol=0, atol=0.03)


def test_soft_targets_sum_to_one_over_ten_bins_and_put_most_on_the_nearest() -> None:
    centres = torch.tensor(gamut_bins(10.0))
    ab = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) * 80 - 40
    nearest = soft_encode(ab, centres, 10, 5.0)
    assert nearest.bins_MK.shape == (200, 10)
    torch.testing.assert_close(nearest.share_MK.sum(1), torch.ones(200))
    weights = torch.exp(-torch.cdist(ab, centres).square() / 50)
    kept = weights.gather(1, nearest.bins_MK)
    torch.testing.assert_close(nearest.share_MK, kept / kept.sum(1, keepdim=True), rtol=1e-3, atol=1e-6)
    at_centre = soft_encode(centres[7:8], centres, 10, 5.0)
    assert int(at_centre.bins_MK[0, 0]) == 7
    assert int(at_centre.share_MK.argmax()) == 0
    assert soft_encode(ab + 5000, centres, 10, 5.0).share_MK.isfinite().all()


def test_uniform_logits_cost_the_log_of_the_number_of_bins() -> None:
    nearest = Nearest(torch.arange(10).expand(50, 10), torch.full((50, 10), 0.1))
    every = torch.ones(50)
    assert float(colour_loss(torch.zeros(50, 313), nearest, every, every)) == pytest.approx(5.7462, abs=1e-4)


def test_rare_colours_weigh_in_the_gradient_and_not_in_the_loss() -> None:
    nearest = Nearest(torch.tensor([[0], [1]]), torch.ones(2, 1))
    logits = torch.zeros(2, 2, requires_grad=True)
    loss = colour_loss(logits, nearest, torch.ones(2), torch.tensor([0.5, 3.0]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.125, 0.125], [0.75, -0.75]]))


def test_rebalancing_weights_have_mean_one_and_the_papers_form() -> None:
    prior = torch.tensor([0.9, 0.09, 0.01], dtype=torch.float64)
    weight = rebalancing(prior, 0.5)
    assert float((prior * weight).sum()) == pytest.approx(1)
    assert float(weight[2] / weight[0]) == pytest.approx((0.45 + 1 / 6) / (0.005 + 1 / 6))
    torch.testing.assert_close(rebalancing(prior, 1.0), torch.ones(3, dtype=torch.float64))


def counts_of(colours: dict[tuple[int, int], int]) -> Tensor:
    counts = torch.zeros(AB_SIDE**2, dtype=torch.int64)
    for (a, b), count in colours.items():
        counts[(a - AB_LOW) * AB_SIDE + b - AB_LOW] = count
    return counts


def test_bins_without_tiles_are_closed_and_chance_is_the_best_single_answer() -> None:
    centres = torch.tensor(gamut_bins(10.0))
    config = ColorizationConfig(neighbours=1, uniform_share=1.0)  # hard, not rebalanced: plain shares
    prior = prior_of(counts_of({(20, -10): 700, (31, -9): 300, (60, 60): 0}), centres, config)
    assert centres[prior.open_Q].tolist() == [[20, -10], [30, -10]]
    assert float(prior.chance) == pytest.approx(0.7)
    assert float(prior.ceiling) == pytest.approx(-0.7 * math.log(0.7) - 0.3 * math.log(0.3))
    rare = prior_of(counts_of({(20, -10): 99_999, (60, 60): 1}), centres, config)
    assert int(rare.open_Q.sum()) == 1  # one pixel in 100,000 is no colour of the tiles


def test_grey_tiles_say_nothing() -> None:
    method = task("colorization").eval()  # statistics of the batch would tell one tile of another
    tiles = oriented(8)
    grey_tiles = tiles[:, :1].expand(-1, 3, -1, -1)
    outcome = method(views_of(method, grey_tiles))
    assert outcome.loss.item() == 0
    assert float(outcome.metrics["grey_tiles"]) == 1
    half = method(views_of(method, torch.cat([tiles, grey_tiles])))
    assert half.loss.item() == pytest.approx(method(views_of(method, tiles)).loss.item() / 2, rel=1e-5)
    assert grey(torch.full((1, 2, 3, 3), 5.0), 5.0).tolist() == [True]


def test_the_network_sees_lightness_and_no_colour() -> None:
    method = task("colorization", norm=False)
    seen: list[Tensor] = []
    method.backbone.layers.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    method(views_of(method, oriented(4)))
    assert torch.equal(seen[0][:, 0], seen[0][:, 1])
    assert torch.equal(seen[0][:, 0], seen[0][:, 2])
    assert 0.1 < float(seen[0].mean()) < 0.9


def test_prior_is_that_of_the_tiles_and_belongs_to_the_state() -> None:
    method, other = task("colorization"), task("colorization")
    ceiling = method.loss_ceiling()
    for part in range(2):
        method.prefill(views_of(method, oriented(16, part), 16 * part))
    assert 1 < int(method.open_Q.sum()) < len(method.open_Q)
    assert method.loss_ceiling() < ceiling
    other.load_state_dict(method.state_dict())
    views = views_of(method, oriented(4))
    torch.testing.assert_close(method(views).metrics["chance"], other(views).metrics["chance"])
    assert torch.equal(method.train()(views).loss, other.train()(views).loss)


def test_tokens_go_back_to_their_square() -> None:
    class Vit(nn.Module):
        num_prefix_tokens = 1

    tokens = torch.arange(1 + 9.0)[None, :, None].expand(1, 10, 4)
    assert as_map(Vit(), tokens)[0, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize("name", TASKS)
def test_tissue_recipe_leaves_the_answer_in_the_picture(name: str) -> None:
    (view,) = recipe_named(entry_of(name).default_recipe).views
    assert view.rotation_deg == 0  # no corner is empty
    assert view.jpeg_p > 0
    assert view.ratio == (1, 1)
    assert (view.quarter_turns, view.flip_p) == ((False, 0) if name == "rotation" else (True, 0.5))
    if name == "colorization":
        assert (view.grey_p, view.jitter_p, view.stain_p) == (0, 0, 0)
    if name in ("context", "jigsaw"):
        assert view.grey_p == 0.66


def test_a_run_warns_before_and_reports_accuracy_against_chance_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = write_synthetic_store(Workspace(tmp_path / "store"), slides=("A1", "A2"), tiles_per_slide=8, tile_px=40)
    config = PretrainConfig(
        method="rotation", backbone="resnet10t", weights="random", steps=2, batch_size=4, view_px=32
    )
    result = pretrain(index, PretrainDir(tmp_path / "run"), config, RuntimeConfig(num_workers=0, log_every=1))
    assert "rotation is ill-posed on tissue" in capsys.readouterr().err
    assert "by chance" in result.text
    assert load_backbone(PretrainDir(tmp_path / "run").backbone)[1].method == "rotation"
