"""Self-supervised objectives, one file each. `REGISTRY` is how the command line finds them by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from histossl.core.errors import UsageError
from histossl.core.options import nearest


@dataclass(frozen=True)
class Entry:
    """A method before torch is needed: what `histossl methods` prints, and where its class lies."""

    module: str
    class_name: str
    config_name: str
    learns_from: str
    backbones: str
    memory: str
    choose: str
    default_recipe: str


REGISTRY: dict[str, Entry] = {
    "simclr": Entry(
        "histossl.methods.simclr",
        "SimCLR",
        "SimCLRConfig",
        "finding a tile's other view among all other tiles of the batch",
        "any; LARS for those with BatchNorm, AdamW for ViT and ConvNeXt",
        "9 / 11 GB: two views with gradient",
        "when 512 tiles and more fit in one pass of all GPUs together; below, mocov2",
        "simclr-histology",
    ),
    "simclrv2": Entry(
        "histossl.methods.simclrv2",
        "SimCLRv2",
        "SimCLRv2Config",
        "as simclr, with a deeper head whose first layer stays on the backbone",
        "any; LARS for those with BatchNorm, AdamW for ViT and ConvNeXt",
        "9 / 11 GB; with a memory of keys a third view without gradient",
        "instead of simclr, when few labels are to finetune the whole network",
        "simclr-histology",
    ),
    "mocov1": Entry(
        "histossl.methods.mocov1",
        "MoCoV1",
        "MoCoV1Config",
        "as mocov2, with a linear head and the colour jitter of 2019",
        "any",
        "5 / 7 GB: two views, one without gradient",
        "as a baseline: v2 has been better on every published task",
        "mocov1-histology",
    ),
    "mocov2": Entry(
        "histossl.methods.mocov2",
        "MoCoV2",
        "MoCoV2Config",
        "telling a tile's own key from a queue of other tiles' keys",
        "any",
        "5 / 7 GB: two views, one without gradient",
        "first: small batches on one GPU are enough",
        "mocov2-histology",
    ),
    "mocov3": Entry(
        "histossl.methods.mocov3",
        "MoCoV3",
        "MoCoV3Config",
        "predicting a tile's slowly moving key among all keys of the batch",
        "ViT (patch embedding frozen), or any; LARS for those with BatchNorm, else AdamW",
        "10 / 13 GB: four encodings of a tile, two without gradient",
        "for a ViT when 512 tiles and more fit in one pass of all GPUs together",
        "mocov3-histology",
    ),
    "dino": Entry(
        "histossl.methods.dino",
        "DINO",
        "DINOConfig",
        "agreeing with a slow copy of itself about crops of all sizes",
        "any",
        "16 / 20 GB: 2 + 8 crops",
        "for CNNs, when MoCo v2 has shown its best",
        "dino-histology",
    ),
    "ibot": Entry(
        "histossl.methods.ibot",
        "IBOT",
        "IBOTConfig",
        "the same, and telling masked patches from those around them",
        "ViT",
        "16 GB: 2 + 8 crops, patch tokens",
        "as a simpler DINOv2",
        "dino-histology",
    ),
    "dinov2": Entry(
        "histossl.methods.dinov2",
        "DINOv2",
        "DINOv2Config",
        "the same, with balanced prototypes and features spread apart",
        "ViT",
        "22 GB: 2 + 8 crops, two heads; less with --recompute",
        "for ViTs, above all those with DINOv2's weights, on a GPU",
        "dinov2-histology",
    ),
    "rotation": Entry(
        "histossl.methods.pretext.rotation",
        "Rotation",
        "RotationConfig",
        "telling by how many quarters a tile was turned",
        "any",
        "17 / 22 GB: four turns of one view",
        "as a negative control: tissue has no up",
        "rotation-histology",
    ),
    "context": Entry(
        "histossl.methods.pretext.context",
        "Context",
        "ContextConfig",
        "telling on which side of a patch its neighbour lies",
        "any that takes small images: ResNet, ConvNeXt, ViT",
        "2 / 4 GB: nine patches of one view",
        "as a control: close to ill-posed on tissue",
        "context-histology",
    ),
    "jigsaw": Entry(
        "histossl.methods.pretext.jigsaw",
        "Jigsaw",
        "JigsawConfig",
        "telling in which order nine patches lie",
        "any that takes small images: ResNet, ConvNeXt, ViT",
        "4 / 4 GB: nine patches of one view",
        "as a control: close to ill-posed on tissue",
        "jigsaw-histology",
    ),
    "colorization": Entry(
        "histossl.methods.pretext.colorization",
        "Colorization",
        "ColorizationConfig",
        "telling a tile's colours from its lightness",
        "any of timm's with a feature map",
        "one view and a small decoder: low",
        "as a control: it learns stains",
        "colorization-histology",
    ),
}


# What learns from a labelled-slide model: `histossl distill` runs it, `histossl pretrain` has no teacher for it.
TAUGHT: dict[str, Entry] = {
    "distillation": Entry(
        "histossl.methods.distillation",
        "Distillation",
        "DistillationConfig",
        "what a labelled-slide model says of each tile (histossl distill)",
        "any, also another than the teacher's",
        "one view, and the teacher's forward pass: low",
        "last: to make a small model of a large one, or to use unlabelled tiles for the task itself",
        "distillation-histology",
    ),
}


def self_supervised(name: str) -> Entry:
    """The entry of a method that needs tiles alone."""
    if name in TAUGHT:
        raise UsageError(
            f"method {name!r}: learns from a labelled-slide model; "
            "histossl distill --teacher WORKSPACE/finetune/NAME/model"
        )
    return entry_of(name)


def entry_of(name: str) -> Entry:
    if name in TAUGHT:
        return TAUGHT[name]
    if name not in REGISTRY:
        raise UsageError(
            f"method {name!r}: not known{nearest(name, REGISTRY) or '.'} There are: {', '.join(sorted(REGISTRY))}"
        )
    return REGISTRY[name]


def classes_of(name: str) -> tuple[Any, Any]:
    """(Method class, its config class)."""
    from importlib import import_module

    entry = entry_of(name)
    module = import_module(entry.module)
    return getattr(module, entry.class_name), getattr(module, entry.config_name)
