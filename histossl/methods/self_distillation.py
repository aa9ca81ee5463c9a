"""What DINO, iBOT and DINOv2 share: a student learns what its own slow copy, the teacher, says of other crops.

    teacher  sees the two global crops, whole; its prototypes are centred or balanced; follows the student by EMA
    student  sees all crops, the global ones perhaps with masked patches; one pass for each crop size
    loss     crops:   the teacher's prototypes of one crop from every other crop's pooled feature
             patches: the teacher's prototypes of each masked patch from what the student sees around it
             spread:  features of different tiles are pushed apart (KoLeo or KDE)

dino.py, ibot.py and dinov2.py say which of this they take, with which values.

What continuing changes (algorithms.md 2): student and teacher both begin as the given weights; heads are new, the
teacher's a copy of the student's; the last layer rests at first; rates are small and fall from block to block. The
teacher keeps its papers' momentum also in short runs: with a memory of 50 steps it forgot its first, random prototypes
before the student had learnt any, and both ended uniform (examples/LOG.md, 2026-11-25). Sinkhorn, KoLeo and KDE are of
the tiles of one pass of all processes: micro-batches make them see less.

B tiles of this process, V crops of a tile, N patches of a crop, D features, K prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.config import knob, require
from histossl.core.errors import UsageError
from histossl.methods.losses.koleo import kde, koleo
from histossl.methods.losses.prototype import Ailments, assignment_metrics, centred, patch_loss, sinkhorn, view_loss
from histossl.methods.method import Method, Outcome, Training, Views
from histossl.methods.modules.batchnorm import globalise_batchnorms
from histossl.methods.modules.ema import ema_update, frozen_copy
from histossl.methods.modules.masked_vit import Features, Tokens, patch_px
from histossl.methods.modules.masking import block_masks, masked_shares, random_masks
from histossl.methods.modules.projection_heads import PrototypeHead
from histossl.methods.ramps import half_cosine, ramp
from histossl.runtime import collectives
from histossl.views.geometry import on
from histossl.views.recipe import ViewRecipe

NUM_GLOBAL = 2
CARON, ZHOU, OQUAB = "DINO, 2104.14294", "iBOT, 2111.07832", "DINOv2, 2304.07193"
NANOPATH = "nanopath"  # MedARC-AI/nanopath: DINOv2 continued on tissue on one GPU


@dataclass(frozen=True)
class SelfDistillationConfig:
    """Knobs that DINO, iBOT and DINOv2 share. Shares are of the run's steps."""

    prototypes: int = knob(65536, "of the head; the planner gives what fits the tile set", "65536", CARON)
    bottleneck_dim: int = knob(256, "width before the prototypes", "256", CARON)
    hidden_dim: int = knob(2048, "width of the head's hidden layers", "2048", CARON)
    head_layers: int = knob(3, "linear layers of the head, the bottleneck among them", "3", CARON)
    trainable_norm: bool = knob(False, "prototypes have a gain of their own", "false (ViT-S: true)", CARON)
    student_temperature: float = knob(0.1, "of the student's softmax", "0.1", CARON)
    teacher_temperature: float = knob(0.04, "of the teacher's; 0.08 and more end at ln K", "0.04 to 0.07", CARON)
    warmup_teacher_temperature: float = knob(0.04, "where it begins", "0.04", CARON)
    teacher_temperature_warmup: float = knob(0.3, "share in which it rises", "30 epochs (code: 0)", CARON)
    momentum: float = knob(0.996, "of the teacher; less in a short run ends uniform", "0.996", CARON)
    momentum_end: float = knob(1.0, "to which it rises by a cosine; 0: it stays", "1", CARON)
    assign: str = knob("sinkhorn", "how prototypes share the tiles: sinkhorn or centre", "centre", CARON)
    centre_momentum: float = knob(0.9, "of the centre; 0.999 fails", "0.9", CARON)
    freeze_last_layer: float = knob(0.02, "share in which the prototypes rest", "1 epoch", CARON)
    num_local: int = knob(8, "small crops", "8 (code), 10 (paper)", CARON)
    local_px: int = knob(0, "side of the small crops; 0: 96 at 224, in that proportion", "96", CARON)
    drop_path: float = knob(0.1, "stochastic depth, of the student alone", "0.1", CARON)

    def __post_init__(self) -> None:
        require(self.prototypes >= 2, "set prototypes", self.prototypes, "2 or more")
        for name in ("bottleneck_dim", "hidden_dim", "head_layers"):
            require(getattr(self, name) >= 1, f"set {name}", getattr(self, name), "1 or more")
        for name in ("student_temperature", "teacher_temperature", "warmup_teacher_temperature"):
            require(getattr(self, name) > 0, f"set {name}", getattr(self, name), "above 0")
        for name in (
            "momentum",
            "momentum_end",
            "centre_momentum",
            "freeze_last_layer",
            "teacher_temperature_warmup",
        ):
            require(0 <= getattr(self, name) <= 1, f"set {name}", getattr(self, name), "between 0 and 1")
        require(self.assign in ("centre", "sinkhorn"), "set assign", self.assign, "centre or sinkhorn")
        require(0 <= self.num_local <= 32, "set num_local", self.num_local, "0 to 32")
        require(self.local_px == 0 or self.local_px >= 8, "set local_px", self.local_px, "0, or 8 pixels and more")
        require(0 <= self.drop_path < 1, "set drop_path", self.drop_path, "0 or more, below 1")


@dataclass(frozen=True)
class MaskedConfig(SelfDistillationConfig):
    """What iBOT and DINOv2 have beside it."""

    crop_weight: float = knob(1.0, "of the loss between crops", "1", ZHOU)
    patch_weight: float = knob(1.0, "of the loss at masked patches", "1", ZHOU)
    share_head: bool = knob(True, "one head for crops and patches", "true (code: false)", ZHOU)
    mask_probability: float = knob(0.5, "share of the global crops that are masked", "0.5", ZHOU)
    mask_low: float = knob(0.1, "least share of patches masked in one of them", "0.1", ZHOU)
    mask_high: float = knob(0.5, "most", "0.5", ZHOU)
    mask_kind: str = knob("block", "block or random", "block", ZHOU)
    least_block: int = knob(0, "least patches of a block; 0: a third of the grid, squared", "16 of 14 x 14", ZHOU)
    patch_teacher_temperature: float = knob(0.0, "of the teacher at patches; 0: as of crops", "0.04 to 0.07", ZHOU)
    patch_centre: str = knob("all", "patches whose mean is the patches' centre: all or masked", "all", ZHOU)
    koleo_weight: float = knob(0.0, "of KoLeo on the global crops' features", "0", ZHOU)
    kde_weight: float = knob(0.0, "of the kernel density of the global crops' features", "0", ZHOU)
    kde_kappa: float = knob(10.0, "its sharpness", "5 (Virchow2), 10 (nanopath)", NANOPATH)
    high_resolution_px: int = knob(0, "side of the global crops in the last phase; 0: there is none", "-", ZHOU)
    high_resolution_share: float = knob(0.1, "share of that phase, where there is one", "-", ZHOU)
    high_resolution_lr: float = knob(0.5, "factor on the learning rate in that phase", "-", ZHOU)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "crop_weight", "patch_weight", "koleo_weight", "kde_weight", "kde_kappa", "least_block",
            "patch_teacher_temperature",
        ):  # fmt: skip
            require(getattr(self, name) >= 0, f"set {name}", getattr(self, name), "0 or more")
        require(0 <= self.mask_probability <= 1, "set mask_probability", self.mask_probability, "between 0 and 1")
        ordered = 0 < self.mask_low <= self.mask_high < 1
        require(ordered, "set mask_low, mask_high", f"{self.mask_low}, {self.mask_high}", "0 < low <= high < 1")
        require(self.mask_kind in ("block", "random"), "set mask_kind", self.mask_kind, "block or random")
        require(self.patch_centre in ("all", "masked"), "set patch_centre", self.patch_centre, "all or masked")
        share = self.high_resolution_share
        require(0 < share < 1, "set high_resolution_share", share, "a share of the steps, 0 to 1")
        factor = self.high_resolution_lr
        require(0 < factor <= 1, "set high_resolution_lr", factor, "above 0, at most 1")


class Means(NamedTuple):
    """Mean teacher logits (K,) over this process's part of a batch, with how many tokens they are of."""

    crops_K: Tensor
    patches_K: Tensor | None
    num_patches: Tensor | None  # ()


class Masked(NamedTuple):
    """The masked patches of the global crops, flat."""

    mask_XN: Tensor  # bool, X = V x B crops
    token_R: Tensor  # int64, places in (X x N)
    weight_R: Tensor  # one over the masked patches of the token's crop


class SelfDistillation(Method):
    planned: ClassVar[tuple[str, ...]] = ("prototypes",)

    def __init__(
        self, backbone: nn.Module, feature_dim: int, recipe: ViewRecipe, config: SelfDistillationConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.masks = config if isinstance(config, MaskedConfig) else None
        self.recipe = _crops(recipe, config, patch_px(backbone))
        globalise_batchnorms(backbone)
        self.student: nn.Module = Tokens(backbone, type(self).__name__.lower()) if self.masks else backbone
        if isinstance(self.student, Tokens) and self.masks and not self.masks.patch_weight:
            self.student.mask_token.requires_grad_(False)  # nothing is masked
        self.head = self._head(feature_dim)
        self.teacher = frozen_copy(self.student)
        self.teacher_head = frozen_copy(self.head)
        self.patch_head = self.teacher_patch_head = None
        if self.masks and self.masks.patch_weight and not self.masks.share_head:
            self.patch_head = self._head(feature_dim)
            self.teacher_patch_head = frozen_copy(self.patch_head)
        self.register_buffer("centre_K", torch.zeros(config.prototypes))
        self.register_buffer("patch_centre_K", torch.zeros(config.prototypes if self.masks else 0))
        self.ailments, self.progress = Ailments(config.assign), 0.0
        self.centre_K: Tensor
        self.patch_centre_K: Tensor

    @classmethod
    def trained_with(cls, knobs: Any) -> Training:
        terms = {
            "Sinkhorn": knobs.assign == "sinkhorn",
            "KoLeo": getattr(knobs, "koleo_weight", 0),
            "KDE": getattr(knobs, "kde_weight", 0),
        }
        return replace(cls.trained_by, of_the_pass=", ".join(term for term, used in terms.items() if used))

    def _head(self, feature_dim: int) -> PrototypeHead:
        knobs = self.config
        return PrototypeHead(
            feature_dim,
            knobs.prototypes,
            knobs.hidden_dim,
            knobs.bottleneck_dim,
            knobs.head_layers,
            knobs.trainable_norm,
        )

    @property
    def backbone(self) -> Any:  # type: ignore[override]
        return self.teacher.vit if isinstance(self.teacher, Tokens) else self.teacher

    def learner(self) -> nn.Module:
        return self.student.vit if isinstance(self.student, Tokens) else self.student

    def train(self, mode: bool = True) -> SelfDistillation:
        """The teacher drops nothing out; its BatchNorms, if any, take the batch's statistics as the student's do."""
        super().train(mode)
        self.teacher.eval()
        for module in self.teacher.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(mode)
        return self

    def views(self, progress: float = 0.0) -> ViewRecipe:
        if self.masks is None or not self._in_high_resolution(progress):
            return self.recipe
        large = [replace(view, size_px=self.masks.high_resolution_px) for view in self.recipe.views[:NUM_GLOBAL]]
        return ViewRecipe(self.recipe.name, (*large, *self.recipe.views[NUM_GLOBAL:]))

    def lr_factor(self, progress: float) -> float:
        return self.masks.high_resolution_lr if self.masks and self._in_high_resolution(progress) else 1.0

    def _in_high_resolution(self, progress: float) -> bool:
        masks = self.masks
        return bool(masks and masks.high_resolution_px and progress >= 1 - masks.high_resolution_share)

    # ---- forward: computes, changes nothing

    def forward(self, views: Views) -> Outcome:
        num_tiles = len(views.tiles_B)
        globals_X = torch.cat(views.images[:NUM_GLOBAL])
        masked = self._masked(views, globals_X) if self.masks and self.masks.patch_weight else None
        target_XK, patch_target_RK, means = self._taught(globals_X, masked, views.progress)

        seen = _features(self.student, globals_X, masked.mask_XN if masked else None)
        pooled = [seen.pooled_BD]
        if views.images[NUM_GLOBAL:]:
            pooled.append(_features(self.student, torch.cat(views.images[NUM_GLOBAL:])).pooled_BD)

        temperature, prototypes_KD = self.config.student_temperature, self.head.prototypes_KD()
        towards_QBD = self.head.towards(torch.cat(pooled)).unflatten(0, (-1, num_tiles))
        crops = view_loss(towards_QBD, prototypes_KD, target_XK.unflatten(0, (NUM_GLOBAL, num_tiles)), temperature)
        metrics = {**assignment_metrics(target_XK, loss=crops.detach()), "crop_loss": crops.detach()}
        if self.masks is None:
            return Outcome(crops, metrics, means)
        loss = self.masks.crop_weight * crops
        if masked is not None:
            head = self.patch_head or self.head
            towards_RD = head.towards(seen.patches_BND.flatten(0, 1)[masked.token_R])
            if self.patch_head is not None:
                prototypes_KD = self.patch_head.prototypes_KD()
            patches = patch_loss(
                towards_RD, prototypes_KD, patch_target_RK, masked.weight_R, len(globals_X), temperature
            )
            loss = loss + self.masks.patch_weight * patches
            shares_R = masked.weight_R / len(globals_X)
            metrics |= assignment_metrics(patch_target_RK, "patch_", patches.detach(), shares_R)
            metrics["patch_loss"] = patches.detach()
        spread, more = self._spread(seen.pooled_BD.chunk(NUM_GLOBAL), views.progress)
        return Outcome(loss + spread, metrics | more, means)

    @torch.no_grad()
    def _taught(self, globals_X: Tensor, masked: Masked | None, progress: float) -> tuple[Tensor, Tensor, Means]:
        """What the teacher says of the global crops (X, K) and of their masked patches (R, K), and what centres need.

        Before the student's pass, whose activations then find the memory of this one free. A mean of logits is the
        logits of the mean.
        """
        taught = _features(self.teacher, globals_X)
        towards_XD = self.teacher_head.towards(taught.pooled_BD)
        prototypes_KD = self.teacher_head.prototypes_KD()
        temperature = self._teacher_temperature(progress, self.config.teacher_temperature)
        target_XK = self._assigned(towards_XD, prototypes_KD, self.centre_K, temperature)
        means = Means(_logits_of_sum(towards_XD, prototypes_KD) / len(towards_XD), None, None)
        if masked is None or self.masks is None:
            return target_XK, target_XK[:0], means
        final = self.masks.patch_teacher_temperature or self.config.teacher_temperature
        head, tokens_TD = self.teacher_patch_head or self.teacher_head, taught.patches_BND.flatten(0, 1)
        towards_RD = towards_TD = head.towards(tokens_TD[masked.token_R])
        prototypes_KD = head.prototypes_KD()
        temperature = self._teacher_temperature(progress, final)
        target_RK = self._assigned(towards_RD, prototypes_KD, self.patch_centre_K, temperature)
        if self.config.assign == "centre" and self.masks.patch_centre == "all":
            towards_TD = head.towards(tokens_TD)
        summed_K = _logits_of_sum(towards_TD, prototypes_KD)
        num_patches = torch.full((), len(towards_TD), dtype=torch.float32, device=summed_K.device)
        return target_XK, target_RK, means._replace(patches_K=summed_K, num_patches=num_patches)

    def _teacher_temperature(self, progress: float, final: float) -> float:
        knobs = self.config
        return ramp(progress, knobs.teacher_temperature_warmup, knobs.warmup_teacher_temperature, final)

    def _assigned(self, towards_RD: Tensor, prototypes_KD: Tensor, centre_K: Tensor, temperature: float) -> Tensor:
        logits_RK = F.linear(towards_RD, prototypes_KD.to(towards_RD.dtype))
        if self.config.assign == "sinkhorn":
            return sinkhorn(logits_RK, temperature)
        return centred(logits_RK, centre_K, temperature)

    def _masked(self, views: Views, globals_X: Tensor) -> Masked:
        masks = self.masks
        assert masks is not None
        size = patch_px(self.learner())
        grid = (globals_X.shape[-2] // size, globals_X.shape[-1] // size)
        share_VB = masked_shares(views, NUM_GLOBAL, masks.mask_probability, masks.mask_low, masks.mask_high)
        if masks.mask_kind == "block":
            mask_VBN = block_masks(views, share_VB, grid, masks.least_block or (min(grid) // 3) ** 2)
        else:
            mask_VBN = random_masks(views, share_VB, grid)
        mask_XN = mask_VBN.reshape(-1, grid[0] * grid[1])
        crop_R, _ = mask_XN.nonzero()  # on the CPU, so that a GPU is not waited for
        device = globals_X.device
        weight_R = (1.0 / mask_XN.sum(1).clip(1)[crop_R]).astype("float32")
        return Masked(on(device, mask_XN), on(device, mask_XN.ravel().nonzero()[0]), on(device, weight_R))

    def _spread(self, crops: Sequence[Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """KoLeo and KDE, each summed over the two global crops as in DINOv2's code (its paper: the first alone)."""
        masks = self.masks
        assert masks is not None
        total, metrics = crops[0].new_zeros((), dtype=torch.float32), {}
        for name, weight, term in (
            ("koleo", masks.koleo_weight, koleo),
            # Ramped between a tenth and half of the run, as nanopath: at once, it costs what the start knows.
            ("kde", masks.kde_weight * ramp(max(0.0, progress - 0.1), 0.4, 0.0, 1.0), self._kde),
        ):
            if getattr(masks, f"{name}_weight"):
                value = torch.stack([term(crop) for crop in crops]).sum()
                total = total + weight * value
                metrics[name] = value.detach() / len(crops)
        return total, metrics

    def _kde(self, features_BD: Tensor) -> Tensor:
        assert self.masks is not None
        return kde(features_BD, self.masks.kde_kappa)

    # ---- all change of state

    def before_step(self, progress: float) -> None:
        if progress < self.config.freeze_last_layer:
            for head in (self.head, self.patch_head):
                if head is not None:
                    head.last_layer.weight.grad = None
                    if head.gain_K1 is not None:
                        head.gain_K1.grad = None

    @torch.no_grad()
    def after_step(self, carries: Sequence[Means], progress: float) -> None:
        knobs, self.progress = self.config, progress
        end = knobs.momentum_end or knobs.momentum
        momentum = half_cosine(progress, knobs.momentum, end)
        for slow, fast in (
            (self.teacher, self.student),
            (self.teacher_head, self.head),
            (self.teacher_patch_head, self.patch_head),
        ):
            if slow is not None and fast is not None:
                ema_update(slow, fast, momentum)
        # After the loss: a centre that knew this batch would take from each token a part of itself.
        mean_K = torch.stack([each.crops_K for each in carries]).mean(0)
        self.centre_K.lerp_(collectives.mean_over_processes(mean_K), 1 - knobs.centre_momentum)
        sums = [(each.patches_K, each.num_patches) for each in carries if each.patches_K is not None]
        if sums:
            sum_K = collectives.sum_over_processes(torch.stack([each for each, _ in sums]).sum(0))
            count = collectives.sum_over_processes(torch.stack([each for _, each in sums if each is not None]).sum(0))
            self.patch_centre_K.lerp_(sum_K / count.clamp(min=1), 1 - knobs.centre_momentum)

    # ---- watching

    def ailment(self, row: Mapping[str, float]) -> str:
        return self.ailments.of(row, self.progress)


def _logits_of_sum(towards_TD: Tensor, prototypes_KD: Tensor) -> Tensor:
    """(K,) the sum of all tokens' logits, in fp32 whatever the autocast: centres take a little of it at a time."""
    with torch.autocast(towards_TD.device.type, enabled=False):
        return F.linear(towards_TD.float().sum(0), prototypes_KD.float())


def _features(network: nn.Module, x: Tensor, mask_BN: Tensor | None = None) -> Features:
    """Of a `Tokens`, or of a backbone without tokens (pooled alone)."""
    seen = network(x, mask_BN) if isinstance(network, Tokens) else network(x)
    return seen if isinstance(seen, Features) else Features(seen, seen[:, None])


def _crops(recipe: ViewRecipe, config: SelfDistillationConfig, side_px: int) -> ViewRecipe:
    """Two global crops and `num_local` small ones whose side is whole patches (98 px for patches of 14, not 96)."""
    large_px = config.high_resolution_px if isinstance(config, MaskedConfig) else 0
    if large_px % side_px:
        raise UsageError(f"--set high_resolution_px={large_px}: must be whole patches of {side_px} pixels")
    if len(recipe.views) < NUM_GLOBAL:
        raise UsageError(f"--recipe {recipe.name}: makes {len(recipe.views)} view, and two global crops are needed")
    first, *rest = recipe.views
    local = rest[1] if len(rest) > 1 else None
    if config.num_local and local is None:
        raise UsageError(f"--recipe {recipe.name}: has no small crops; use dino or dinov2, or --set num_local=0")
    if local is None or not config.num_local:
        return ViewRecipe(recipe.name, recipe.views[:NUM_GLOBAL])
    wanted_px = config.local_px or first.size_px * 96 / 224
    if config.local_px and config.local_px % side_px:
        raise UsageError(f"--set local_px={config.local_px}: must be whole patches of {side_px} pixels")
    local_px = max(8, side_px, round(wanted_px / side_px) * side_px)
    small = replace(local, size_px=int(local_px))
    return ViewRecipe(recipe.name, (*recipe.views[:NUM_GLOBAL], *[small] * config.num_local))
