"""Small networks and batches for the contrastive methods' tests."""

import torch
from torch import nn

from histossl.methods.method import Method, Views
from histossl.runtime import collectives

WIDTH = 6


def backbone(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, WIDTH, 3, 2), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers)


def views(first_tile: int = 0, count: int = 8, step: int = 0) -> Views:
    """Two views of each tile that share most of what is in them."""
    generator = torch.Generator().manual_seed(first_tile)
    tile = torch.randn(count, 3, 16, 16, generator=generator)
    images = [tile + 0.3 * torch.randn(count, 3, 16, 16, generator=generator) for _ in range(2)]
    tiles = torch.arange(first_tile, first_tile + count)
    return Views(images, tiles, tiles // 4, step)


def own_views(count: int = 8) -> Views:
    """This process's part of a batch, as many tiles in all."""
    whole = views(count=count)
    images = [collectives.own_part(image) for image in whole.images]
    return whole._replace(
        images=images, tiles_B=collectives.own_part(whole.tiles_B), slides_B=collectives.own_part(whole.slides_B)
    )


def loss_and_gradients(method: Method) -> list[torch.Tensor]:
    """Loss, and each trained weight's gradient, averaged over processes as DistributedDataParallel does."""
    outcome = method(own_views())
    outcome.loss.backward()
    grads = [parameter.grad for parameter in method.parameters() if parameter.requires_grad]
    found = [outcome.loss.detach(), outcome.metrics["loss_ceiling"], *grads]
    buffers = [b for n, b in method.named_buffers() if "running" in n]
    method.after_step([outcome.carry], 0.5)
    rest = [method.queue_KD, method.queue_tiles_K] if hasattr(method, "queue_KD") else []
    return [collectives.mean_over_processes(each) for each in found if each is not None] + buffers + rest


def made_constant(method: Method) -> Method:
    """What a collapsed backbone is: the same features for every tile."""
    torch.nn.init.zeros_(method.backbone[0].weight)
    torch.nn.init.zeros_(method.backbone[0].bias)
    return method


def row(method: Method, step: int = 500) -> dict[str, float]:
    outcome = method(views())
    return {"step": step, "loss": float(outcome.loss.detach()), **{k: float(v) for k, v in outcome.metrics.items()}}
