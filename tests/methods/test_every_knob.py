"""No knob is accepted and ignored: each of each method, turned, changes what a short run does.

A run is three steps of the training loop on a few noise tiles. What may differ is its losses, its weights and state
afterwards, the views it asks for, the layers it keeps for finetuning, or what is refused.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from methods.test_every_method import CPU, PRETEXT, SMALL, drawn
from synthetic_store import write_synthetic_store
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from histossl.backbones.loading import create_backbone
from histossl.core.config import PretrainConfig
from histossl.core.workspace import PretrainDir, Workspace
from histossl.methods import REGISTRY, classes_of
from histossl.methods.method import Method, Rate, Training
from histossl.tiles.store.index import TileIndex
from histossl.training.loop import Precision, train
from histossl.training.pretrain import RuntimeConfig, pretrain
from histossl.training.setup.optim import optimizer_for
from histossl.views.recipe import recipe_named

STEPS, TILES, PX = 3, 8, 32
QUICK: dict[str, Any] = {
    **SMALL, "hidden_dim": 16, "bottleneck_dim": 8, "prototypes": 16, "local_px": 16,
    "prior_tiles": 16,
}  # fmt: skip

# What a knob is turned to, and what must be set for it to mean anything.
TURNED: dict[str, Any] = {
    "prototypes": 24, "bottleneck_dim": 6, "hidden_dim": 10, "head_layers": 2, "trainable_norm": True,
    "student_temperature": 0.2, "teacher_temperature": 0.3, "warmup_teacher_temperature": 0.3,
    "teacher_temperature_warmup": 0.9, "momentum": 0.5, "momentum_end": 0.1, "assign": "centre",
    "centre_momentum": 0.1, "freeze_last_layer": 0.9, "num_local": 1, "local_px": 8,
    "crop_weight": 0.3, "patch_weight": 0.3, "share_head": None, "mask_probability": 0.9, "mask_low": 0.4,
    "mask_high": 0.7, "mask_kind": None, "least_block": 6, "patch_teacher_temperature": 0.3, "patch_centre": None,
    "koleo_weight": 0.5, "kde_weight": 0.5, "kde_kappa": 2.0, "high_resolution_px": 64, "high_resolution_share": 0.6,
    "high_resolution_lr": 0.2,
    "queue_size": 12, "temperature": 0.5, "embedding_dim": 6, "symmetric": True, "same_slide_weight": 0.3,
    "batchnorm_group_tiles": 2, "freeze_patch_embed": False, "finetune_from_layer": 2,
    "all_turns": False,
    "gap": 0.9, "jitter": 0.2, "colour_drop": 0.9,
    "num_orders": 12, "orders_per_tile": 3, "spread": "mean", "order_seed": 1,
    "bin_size": 20.0, "neighbours": 3, "sigma": 15.0, "uniform_share": 0.1, "grey_at_most": 200.0, "least_share": 0.02,
    "prior_tiles": 8, "stride": 8, "decoder_dim": 16,
}  # fmt: skip
NEEDS: dict[str, dict[str, Any]] = {
    "centre_momentum": {"assign": "centre"},
    "patch_centre": {"assign": "centre"},
    "warmup_teacher_temperature": {"teacher_temperature_warmup": 0.9},
    "teacher_temperature_warmup": {"warmup_teacher_temperature": 0.3},
    "momentum": {"queue_size": 16},
    "least_block": {"mask_kind": "block"},
    "kde_weight": {"kde_weight": 0.0},
    "kde_kappa": {"kde_weight": 1.0},
    "high_resolution_share": {"high_resolution_px": 64},
    "high_resolution_lr": {"high_resolution_px": 64, "high_resolution_share": 0.5},
}
EVERY = [(name, field.name) for name in REGISTRY for field in fields(classes_of(name)[1])]


def made(name: str, knobs: Any) -> Method:
    torch.manual_seed(0)
    if name in ("dino", "ibot", "dinov2", "mocov3"):
        backbone: nn.Module = VisionTransformer(
            img_size=PX, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0, dynamic_img_size=True
        )
    elif name in PRETEXT:
        backbone = create_backbone("test_resnet", "random")[0]
    else:
        layers = [nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        backbone = nn.Sequential(*layers)
    width = int(getattr(backbone, "num_features", 16))
    side = 64 if name in PRETEXT else PX  # a patch of a third must still be an image
    method: Method = classes_of(name)[0](backbone, width, recipe_named(REGISTRY[name].default_recipe, side), knobs)
    return method.train()


def knobs_of(name: str, **more: Any) -> Any:
    config = classes_of(name)[1]
    own = {field.name for field in fields(config)}
    return config(**{key: value for key, value in {**QUICK, **more}.items() if key in own})


@lru_cache
def ran(name: str, knobs: Any) -> dict[str, Any]:
    """All that a short run shows."""
    method = made(name, knobs)
    shown: dict[str, Any] = {
        "views": [method.views(share).views for share in (0.0, 0.5, 1.0)],
        "kept": method.projection(),
    }
    generator = torch.Generator().manual_seed(1)
    tiles = torch.nn.functional.interpolate(torch.rand(TILES, 3, 8, 8, generator=generator), 64).mul(255).byte()

    def views(step: int) -> Any:
        return drawn(method, tiles, step)._replace(slides_B=torch.arange(TILES) // 4, progress=step / STEPS)

    prefilled = 0
    while prefilled < method.num_prefill_tiles():
        method.prefill(views(prefilled // TILES)._replace(tiles_B=torch.arange(TILES) + 100))
        prefilled += TILES
    planned: Any = SimpleNamespace(optimizer="adamw", lr=3e-3, weight_decay=0.04, layer_decay=0.75)
    optimizer = optimizer_for(method, planned, CPU)
    precision = Precision()
    loop = train(
        method, optimizer, (views(step) for step in range(STEPS)), lambda _: 3e-3, 0, STEPS, CPU, precision,
        precision.scaler(CPU), 3.0,
    )  # fmt: skip
    shown["losses"] = [float(step.loss) for step in loop]
    shown["state"] = {key: value.clone() for key, value in method.state_dict().items()}
    return shown


def differ(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.shape != other.shape or not torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-7)
    if isinstance(one, dict):
        return other is None or one.keys() != other.keys() or any(differ(one[key], other[key]) for key in one)
    if isinstance(one, list) and one and isinstance(one[0], float):
        return one != pytest.approx(other, rel=1e-5)
    return bool(one != other)


@pytest.mark.parametrize("name", REGISTRY)
def test_the_same_knobs_do_the_same(name: str) -> None:
    assert not differ(ran.__wrapped__(name, knobs_of(name)), ran(name, knobs_of(name)))


@pytest.mark.parametrize(("name", "knob"), [each for each in EVERY if each[1] != "drop_path"])
def test_every_knob_that_is_turned_changes_the_run(name: str, knob: str) -> None:
    before = knobs_of(name, **NEEDS.get(knob, {}))
    value, now = TURNED[knob], getattr(before, knob)
    if value is None:  # of two, the other one
        value = {True: False, False: True, "block": "random", "random": "block", "all": "masked", "masked": "all"}[now]
    assert value != now
    after = replace(before, **{knob: value})
    assert differ(ran(name, before), ran(name, after))


# ---- what only the whole stage wires up: drop path, and how a method is optimized


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TileIndex:
    workspace = Workspace(tmp_path_factory.mktemp("store"))
    return write_synthetic_store(workspace, slides=("A", "B"), tiles_per_slide=12, tile_px=40)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights to continue from: layer decay and gentle rates are for them."""
    found = {}
    for name in ("test_vit", "test_resnet"):
        path = tmp_path_factory.mktemp("start") / f"{name}.pth"
        torch.save(create_backbone(name, "random")[0].state_dict(), path)
        found[name] = str(path)
    return found


def pretrained(index: TileIndex, starts: dict[str, str], folder: Path, name: str, *knobs: str, **more: Any) -> bytes:
    """The weights that three steps of the stage leave. Without momentum: a teacher is then its student."""
    vit = REGISTRY[name].backbones == "ViT"
    backbone, view_px = ("test_vit", 32) if vit else ("test_resnet", 48)
    own = {field.name for field in fields(classes_of(name)[1])}
    small = {**QUICK, "momentum": 0.0, "momentum_end": 0.0, "freeze_last_layer": 0.0}
    chosen = [f"{key}={value}" for key, value in small.items() if key in own and key not in ("drop_path", "prototypes")]
    config = PretrainConfig(
        method=name, backbone=backbone, weights=starts[backbone], steps=3, batch_size=8, view_px=view_px,
        set=(*chosen, *knobs), **more,
    )  # fmt: skip
    run = PretrainDir(folder)
    pretrain(index, run, config, RuntimeConfig(num_workers=0, stop_on_collapse=False))
    return run.backbone.read_bytes()


@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2"])
def test_drop_path_reaches_the_student_s_blocks(
    name: str, index: TileIndex, starts: dict[str, str], tmp_path: Path
) -> None:
    few = "prototypes=16"
    off, on, default = (
        pretrained(index, starts, tmp_path / at, name, few, *knobs)
        for at, knobs in (("off", ["drop_path=0"]), ("on", ["drop_path=0.5"]), ("default", []))
    )
    assert len({off, on, default}) == 3


# Each field of `Training`: a method that it matters to, its new value, what must be set beside it.
OPTIMIZED: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "optimizer": ("dinov2", "sgd", {}),
    "for_batchnorm": ("mocov2", "lars", {}),
    "sgd": ("mocov2", Rate(0.03, 0.02, 256, "linear", 1e-4, "test"), {}),
    "adamw": ("dinov2", Rate(1e-3, 2e-4, 128, "sqrt", 0.04, "test"), {}),
    "lars": ("simclr", Rate(1.2, 0.5, 256, "sqrt", 1e-4, "test"), {}),
    "weight_decay_end": ("dinov2", 0.9, {}),
    "layer_decay": ("dinov2", 0.3, {}),
    "patch_embed_scale": ("dinov2", 1.0, {}),
    "betas": ("dinov2", (0.5, 0.6), {}),
    "warmup": ("dinov2", 0.7, {}),
    "final_lr": ("dinov2", 0.01, {}),
    "clip_by": ("dinov2", "parameter", {"clip_norm": 0.1}),
    "decay_flat": ("mocov2", False, {"weight_decay": 1.0}),
    "prototypes": ("dinov2", (1, 100), {}),
}
TOLD_ONLY = {"of_the_pass", "in_batch"}  # lines of the plan: tests/training/test_planner.py, test_selfdistillation.py


def test_no_field_of_how_a_method_is_optimized_is_forgotten() -> None:
    assert {field.name for field in fields(Training)} == set(OPTIMIZED) | TOLD_ONLY


@pytest.mark.parametrize("field", OPTIMIZED)
def test_how_a_method_is_optimized_reaches_the_weights(
    field: str, index: TileIndex, starts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, value, more = OPTIMIZED[field]
    few = [] if field == "prototypes" or name != "dinov2" else ["prototypes=16"]
    before = pretrained(index, starts, tmp_path / "before", name, *few, **more)
    method_class = classes_of(name)[0]
    monkeypatch.setattr(method_class, "trained_by", replace(method_class.trained_by, **{field: value}))
    assert pretrained(index, starts, tmp_path / "after", name, *few, **more) != before


def test_the_patch_embedding_has_a_fifth_of_its_layer_s_rate() -> None:
    for name, decay in (("dino", 0.75), ("ibot", 0.75), ("dinov2", 0.7)):
        method = made(name, knobs_of(name))
        planned: Any = SimpleNamespace(optimizer="adamw", lr=0.1, weight_decay=0.04, layer_decay=decay)
        scale_of = {
            id(each): group["lr_scale"]
            for group in optimizer_for(method, planned, CPU).param_groups
            for each in group["params"]
        }
        learner: Any = method.learner()
        position, patch = scale_of[id(learner.pos_embed)], scale_of[id(learner.patch_embed.proj.weight)]
        assert position == pytest.approx(decay**2)  # below two blocks, of which the last has the whole rate
        assert patch == pytest.approx(0.2 * position)
