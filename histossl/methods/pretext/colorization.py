"""Colorization: from a tile's lightness alone, tell its colours (Zhang, Isola and Efros 2016, arXiv 1603.08511).

    L, ab = Lab of the tile;  logits over bins of the ab plane, at a quarter of the resolution
    loss  = -sum over the bins of soft(ab) log softmax(logits), soft(ab): the 10 nearest bins by a Gaussian

Colours of H&E lie on a thin sheet of two stains, so bins and their prior are counted on the tiles themselves before
step 0, and kept in the state. What decides a tile's colours is then to a good part the stain of its batch, so the task
may teach the shortcut that stain augmentation is there to remove: it is a control, too.

Decided: rebalancing by rare colours acts on gradients alone (as the official code; the logged loss is the plain one),
by the weight of the nearest bin, w = 1 / ((1 - l) p + l / Q) with sum p w = 1, where p is the mean of the soft targets
(the paper smooths its prior by the same Gaussian). Tiles whose every |ab| is at most 5 are grey and say nothing; the
mean is over all tiles, theirs being 0. Bins that no tile fills are closed, and their logits are not even computed (the
paper has 313 bins; 261 cells of 10 units hold an sRGB colour by our count). Accuracy is weighted as the gradients are,
and chance is the best that one colour for all would reach: unweighted, answering 'white' would look learnt.
The encoder sees L / 100 in all three channels, normalised as its weights want (the paper: one channel), so it stays of
use for RGB. Its last feature map and, for their own sake, the pooled features that are exported go through a small
decoder, where the paper's network keeps a higher resolution to the end. Trained by AdamW, not Adam.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.config import knob, require
from histossl.core.errors import UsageError
from histossl.methods.method import Outcome, Rate, Training, Views
from histossl.methods.modules.batchnorm import globalise_batchnorms
from histossl.methods.pretext.base import Pretext
from histossl.runtime import collectives
from histossl.views.recipe import ViewRecipe

# B tiles, h w a quarter of the view, M = B h w places that are asked about, Q bins, C cells of one unit of ab.

ZHANG = "Zhang et al. 2016, arXiv 1603.08511"
AB_LOW, AB_SIDE = -128, 256  # the plane on which colours are counted, one cell a unit
XYZ_FROM_RGB = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)  # D65


@dataclass(frozen=True)
class ColorizationConfig:
    bin_size: float = knob(10.0, "side of a bin, in units of ab", "10", ZHANG)
    neighbours: int = knob(10, "bins that a colour is shared among", "10 (paper's text: 5)", ZHANG)
    sigma: float = knob(5.0, "of the Gaussian that shares it", "5", ZHANG)
    uniform_share: float = knob(0.5, "of the rebalancing: 0 by the prior alone, 1 none", "0.5", ZHANG)
    grey_at_most: float = knob(5.0, "a tile with every |ab| up to this is left out", "5", "richzhang/colorization")
    least_share: float = knob(1e-4, "of all pixels, for a bin to be open", "0", "ours")
    prior_tiles: int = knob(1024, "whose colours are counted before step 0", "1,281,167", ZHANG)
    stride: int = knob(4, "view pixels to a pixel of the answer, on either axis", "4", ZHANG)
    decoder_dim: int = knob(128, "channels of the decoder", "", "ours")

    def __post_init__(self) -> None:
        require(1 <= self.bin_size <= 50, "set bin_size", self.bin_size, "1 to 50")
        require(1 <= self.neighbours <= 100, "set neighbours", self.neighbours, "1 to 100")
        require(self.sigma > 0, "set sigma", self.sigma, "above 0")
        require(0 <= self.uniform_share <= 1, "set uniform_share", self.uniform_share, "between 0 and 1")
        require(self.grey_at_most >= 0, "set grey_at_most", self.grey_at_most, "0 or more")
        require(0 <= self.least_share < 0.5, "set least_share", self.least_share, "0 to 0.5")
        require(self.prior_tiles >= 1, "set prior_tiles", self.prior_tiles, "1 or more")
        require(1 <= self.stride <= 32, "set stride", self.stride, "1 to 32")
        require(self.decoder_dim >= 2, "set decoder_dim", self.decoder_dim, "at least 2")


class Colorization(Pretext):
    trained_by = Training(
        optimizer="adamw",
        adamw=Rate(3e-4, 1e-4, 128, "sqrt", 1e-3, "ours (Zhang: 3e-5 for 450,000 steps of 40)"),
        betas=(0.9, 0.99),
    )
    question = "a tile's colours"
    shortcuts = "one stain for all tiles, JPEG's coarser chroma"
    stuck_by = ("one stain for all tiles, of which lightness tells the rest", "too few steps for so new a decoder")
    caution = (
        "colorization on tissue is to a good part telling the stain of a batch from its texture, which amplifies that "
        "shortcut: use it as a control"
    )
    mean: Tensor
    std: Tensor
    counts_C: Tensor
    open_Q: Tensor
    weight_Q: Tensor
    ceiling: Tensor
    opened: Tensor

    def __init__(self, backbone: nn.Module, feature_dim: int, recipe: ViewRecipe, config: ColorizationConfig) -> None:
        bins = gamut_bins(config.bin_size)
        super().__init__(backbone, recipe, len(bins))
        if not (hasattr(backbone, "forward_features") and hasattr(backbone, "forward_head")):
            raise UsageError("--method colorization: this backbone has no feature map; use one of timm's")
        self.config = config
        side_px = recipe.views[0].size_px
        if side_px < config.stride:
            raise UsageError(f"--set stride={config.stride}: must be at most the view's {side_px} px")
        statistics = getattr(backbone, "pretrained_cfg", None) or {}
        for name, fallback in (("mean", (0.0,) * 3), ("std", (1.0,) * 3)):
            value = torch.tensor(statistics.get(name, fallback), dtype=torch.float32)[:, None, None]
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("centres_QA", torch.tensor(bins, dtype=torch.float32), persistent=False)
        self.centres_QA: Tensor
        # What was counted, and what follows from it. Until then all bins are open and alike.
        self.register_buffer("counts_C", torch.zeros(AB_SIDE**2, dtype=torch.int64))
        self.register_buffer("open_Q", torch.ones(len(bins), dtype=torch.bool))
        self.register_buffer("weight_Q", torch.ones(len(bins)))
        self.register_buffer("ceiling", torch.tensor(math.log(len(bins))))
        # Places of the open bins, kept beside the mask: asked in each step, a GPU's answer would have to be waited for.
        self.register_buffer("opened", torch.arange(len(bins)), persistent=False)
        self.register_load_state_dict_post_hook(lambda *_: self._find_opened())  # type: ignore[no-untyped-call]
        self.num_counted = 0
        self.decoder = Decoder(_map_channels(backbone, side_px), feature_dim, config.decoder_dim, len(bins))
        globalise_batchnorms(self)

    # ---- forward

    def forward(self, views: Views) -> Outcome:
        L_B1hw, ab_BAhw = self.seen_and_asked(views.images[0])
        backbone: Any = self.backbone
        features = backbone.forward_features((L_B1hw.expand(-1, 3, -1, -1) / 100 - self.mean) / self.std)
        pooled_BD = backbone.forward_head(features)
        logits_BQhw = self.decoder(as_map(self.backbone, features), pooled_BD, ab_BAhw.shape[2:], self.opened)
        asked_B = ~grey(ab_BAhw, self.config.grey_at_most)
        ab_MA = ab_BAhw.permute(0, 2, 3, 1).reshape(-1, 2)
        logits_MQ = logits_BQhw.permute(0, 2, 3, 1).flatten(0, 2)
        nearest = soft_encode(ab_MA, self.centres_QA[self.opened], self.config.neighbours, self.config.sigma)
        counted_M = asked_B.repeat_interleave(len(ab_MA) // len(asked_B)).float()
        weight_M = self.weight_Q[self.opened][nearest.bins_MK[:, 0]] * counted_M
        loss = colour_loss(logits_MQ, nearest, counted_M, weight_M)
        right_M = logits_MQ.argmax(1) == nearest.bins_MK[:, 0]
        outcome = self.outcome(loss, (weight_M * right_M).sum(), weight_M.sum())
        return outcome._replace(metrics={**outcome.metrics, "grey_tiles": 1 - asked_B.float().mean()})

    @torch.no_grad()
    def seen_and_asked(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """L (B, 1, H, W), and ab (B, 2, h, w) as the mean over squares of `stride` pixels, of a normalised view."""
        with torch.autocast(view.device.type, enabled=False):
            lab = lab_of_rgb((view.float() * self.std + self.mean).clamp(0, 1))
            return lab[:, :1], F.avg_pool2d(lab[:, 1:], self.config.stride)

    # ---- before step 0

    def num_prefill_tiles(self) -> int:
        return self.config.prior_tiles

    @torch.no_grad()
    def prefill(self, views: Views) -> None:
        """Count the tiles' colours. Whole numbers, so their sum is the same in whatever order and on any processes."""
        _, ab_BAhw = self.seen_and_asked(views.images[0])
        ab_BAhw = ab_BAhw[~grey(ab_BAhw, self.config.grey_at_most)]
        cell = (ab_BAhw.round().long() - AB_LOW).clamp(0, AB_SIDE - 1)
        counts = torch.bincount((cell[:, 0] * AB_SIDE + cell[:, 1]).flatten(), minlength=AB_SIDE**2)
        self.counts_C += collectives.sum_over_processes(counts)
        before, self.num_counted = self.num_counted, self.num_counted + len(views.images[0]) * collectives.world_size()
        # Now and then, and at the end: after each batch it would take longer than counting.
        due = self.num_counted >= self.config.prior_tiles or self.num_counted.bit_length() > before.bit_length()
        if due and self.counts_C.any():
            prior = prior_of(self.counts_C.cpu(), self.centres_QA.cpu(), self.config)
            for buffer, value in zip((self.open_Q, self.weight_Q, self.chance, self.ceiling), prior, strict=True):
                buffer.copy_(value)
            self._find_opened()

    def _find_opened(self) -> None:
        self.opened = self.open_Q.nonzero().flatten()

    def loss_ceiling(self) -> float:
        return float(self.ceiling)


# ---- colours


def lab_of_rgb(x: Tensor) -> Tensor:
    """CIE Lab (D65) of sRGB in [0, 1], both (B, 3, H, W): L in 0..100, ab about -110..110."""
    linear = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    matrix = x.new_tensor(XYZ_FROM_RGB) / x.new_tensor(WHITE)[:, None]
    xyz = torch.einsum("ij,bjhw->bihw", matrix, linear)
    X, Y, Z = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * Y - 16, 500 * (X - Y), 200 * (Y - Z)], 1)


def grey(ab_BAhw: Tensor, at_most: float) -> Tensor:
    """(B,) whether a tile has no colour to tell."""
    return ab_BAhw.abs().flatten(1).amax(1) <= at_most


@lru_cache(maxsize=4)
def gamut_bins(size: float) -> tuple[tuple[float, float], ...]:
    """Centres (Q, 2) of the bins of the ab plane that hold any sRGB colour."""
    line = torch.arange(0, 256, 5, dtype=torch.float64) / 255
    rgb = torch.cartesian_prod(line, line, line).T[None, :, :, None]
    ab = (lab_of_rgb(rgb)[0, 1:, :, 0].T / size).round().long()
    return tuple((float(a) * size, float(b) * size) for a, b in torch.unique(ab, dim=0).tolist())


class Nearest(NamedTuple):
    """The K bins nearest to each colour, nearest first, and the share that each gets: rows sum to 1."""

    bins_MK: Tensor
    share_MK: Tensor


def soft_encode(ab_MA: Tensor, centres_QA: Tensor, neighbours: int, sigma: float) -> Nearest:
    distance_MQ = torch.cdist(ab_MA, centres_QA, compute_mode="donot_use_mm_for_euclid_dist")  # exact ties stay ties
    near = distance_MQ.topk(min(neighbours, len(centres_QA)), dim=1, largest=False)
    # Relative to the nearest: a colour far from every open bin must not come to 0 / 0.
    closer = near.values[:, :1].square() - near.values.square()
    return Nearest(near.indices, torch.softmax(closer / (2 * sigma**2), 1))


def colour_loss(logits_MQ: Tensor, nearest: Nearest, counted_M: Tensor, weight_M: Tensor) -> Tensor:
    """Mean cross-entropy with soft targets, where `counted_M` is 1; the gradients are those of the mean by `weight_M`.

    ln Q where the logits are all alike. The mean is over all M places, counted or not.
    """
    with torch.autocast(logits_MQ.device.type, enabled=False):
        log_p_MK = F.log_softmax(logits_MQ.float(), 1).gather(1, nearest.bins_MK)
        nll_M = -(nearest.share_MK * log_p_MK).sum(1)
        balanced = (nll_M * weight_M).mean()
        return balanced + ((nll_M * counted_M).mean() - balanced).detach()


class Prior(NamedTuple):
    open_Q: Tensor  # bins that hold colours
    weight_Q: Tensor  # of each bin's colours in the gradient; closed ones 0
    chance: Tensor  # weighted accuracy of the best single answer
    ceiling: Tensor  # loss of the best answer that looks at nothing, as the weighted gradients find it


def prior_of(counts_C: Tensor, centres_QA: Tensor, config: ColorizationConfig) -> Prior:
    """What follows from the colours counted, on the CPU and in double precision."""
    cells = counts_C.nonzero().flatten()
    count = counts_C[cells].double()
    count /= count.sum()
    ab = torch.stack([cells // AB_SIDE, cells % AB_SIDE], 1).double() + AB_LOW
    centres = centres_QA.double()
    first = soft_encode(ab, centres, 1, config.sigma).bins_MK[:, 0]
    held = torch.zeros(len(centres), dtype=torch.float64).index_add_(0, first, count)
    open_Q = held > min(config.least_share, float(held.max()) / 2)
    opened = open_Q.nonzero().flatten()
    nearest = soft_encode(ab, centres[opened], config.neighbours, config.sigma)

    def shared(weight: Tensor) -> Tensor:
        """Soft targets of all cells, added up by their weights."""
        every = torch.zeros(len(opened), dtype=torch.float64)
        return every.index_add_(0, nearest.bins_MK.flatten(), (weight[:, None] * nearest.share_MK).flatten())

    smoothed = shared(count)
    weight = rebalancing(smoothed, config.uniform_share)
    hard = torch.zeros(len(opened), dtype=torch.float64).index_add_(0, nearest.bins_MK[:, 0], count)
    answer = shared(count * weight[nearest.bins_MK[:, 0]])
    weight_Q = torch.zeros(len(centres), dtype=torch.float64)
    weight_Q[opened] = weight
    chance = (hard * weight).max() / (hard * weight).sum()
    return Prior(open_Q, weight_Q, chance, -(smoothed * (answer / answer.sum()).log()).sum())


def rebalancing(prior_Q: Tensor, uniform_share: float) -> Tensor:
    """w = 1 / ((1 - l) p + l / Q), scaled so that sum p w = 1."""
    weight = 1 / ((1 - uniform_share) * prior_Q + uniform_share / len(prior_Q))
    return weight / (prior_Q * weight).sum()


# ---- from features to bins


class Decoder(nn.Module):
    """The feature map, with the pooled features added everywhere, brought to the answer's size and mixed 3 x 3."""

    def __init__(self, map_dim: int, feature_dim: int, dim: int, num_bins: int) -> None:
        super().__init__()
        self.of_map, self.of_pooled = nn.Conv2d(map_dim, dim, 1), nn.Linear(feature_dim, dim)
        self.norm, self.mixed_norm = nn.BatchNorm2d(dim), nn.BatchNorm2d(dim)
        self.mix = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.last = nn.Conv2d(dim, num_bins, 1)

    def forward(self, map_BCyx: Tensor, pooled_BD: Tensor, size: Sequence[int], opened: Tensor) -> Tensor:
        x = self.of_map(map_BCyx) + self.of_pooled(pooled_BD)[:, :, None, None]
        x = F.relu(self.norm(x))
        x = F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
        x = F.relu(self.mixed_norm(self.mix(x)))
        assert self.last.bias is not None
        return F.conv2d(x, self.last.weight[opened], self.last.bias[opened])


def as_map(backbone: nn.Module, features: Tensor) -> Tensor:
    """What timm's `forward_features` gives, as (B, C, y, x): tokens go back to their square, channels to the front."""
    if features.ndim == 3:
        features = features[:, int(getattr(backbone, "num_prefix_tokens", 0)) :]
        side = math.isqrt(features.shape[1])
        return features.transpose(1, 2).reshape(len(features), -1, side, side)
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
        return features.permute(0, 3, 1, 2)
    return features


@torch.no_grad()
def _map_channels(backbone: Any, side_px: int) -> int:
    training = backbone.training
    features = backbone.eval().forward_features(torch.zeros(1, 3, side_px, side_px))
    backbone.train(training)
    return as_map(backbone, features).shape[1]
