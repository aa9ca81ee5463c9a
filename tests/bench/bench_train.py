"""The training step: beside lightly's building blocks, with tiles beside without, and its memory over many steps.

    python tests/bench/bench_train.py              # ten minutes on two cores; with a GPU also the figures for it
    python tests/bench/bench_train.py memory       # one of: lightly, tiles, memory, gpu

Every ratio is of two things timed in turn within this one run.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from synthetic_store import write_synthetic_store

from histossl.backbones.loading import create_backbone
from histossl.core.config import PretrainConfig, RuntimeConfig
from histossl.core.workspace import Workspace
from histossl.methods.method import Views
from histossl.methods.mocov2 import MoCoV2, MoCoV2Config
from histossl.tiles.store.index import TileIndex
from histossl.training.plan import step_times_s
from histossl.training.pretrain import pretrain
from histossl.training.setup.optim import tune
from histossl.views.recipe import recipe_named

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, SIDE, QUEUE, ROUNDS, STEPS = 32, 96, 4096, 5, 4


def ours() -> Callable[[list[Tensor]], None]:
    backbone, info = create_backbone("resnet18", "random")
    config = MoCoV2Config(queue_size=QUEUE, momentum=0.99, batchnorm_group_tiles=0)
    method = MoCoV2(backbone, info.feature_dim, recipe_named("mocov2", SIDE), config).to(DEVICE)
    tune(method, DEVICE, "fp32", compiled=False, deterministic=False)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    tiles = torch.arange(BATCH, device=DEVICE)

    def step(images: list[Tensor]) -> None:
        optimizer.zero_grad()
        views = [image.contiguous(memory_format=torch.channels_last) for image in images]  # as the engine gives them
        outcome = method(Views(views, tiles, tiles, 0))
        outcome.loss.backward()
        optimizer.step()
        method.after_step([outcome.carry], 0.5)

    return step


def theirs() -> Callable[[list[Tensor]], None]:
    """MoCo as in lightly's examples: their head, loss with memory bank, momentum update, in a plain loop."""
    backbone, head = timm.create_model("resnet18", num_classes=0), MoCoProjectionHead(512, 512, 128)
    key_backbone, key_head = timm.create_model("resnet18", num_classes=0), MoCoProjectionHead(512, 512, 128)
    for slow, fast in ((key_backbone, backbone), (key_head, head)):
        slow.load_state_dict(fast.state_dict())
        deactivate_requires_grad(slow)
    modules = nn.ModuleList([backbone, head, key_backbone, key_head]).to(DEVICE)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(QUEUE, 128)).to(DEVICE)
    optimizer = torch.optim.SGD([p for p in modules.parameters() if p.requires_grad], lr=0.01)

    def step(images: list[Tensor]) -> None:
        update_momentum(backbone, key_backbone, m=0.99)
        update_momentum(head, key_head, m=0.99)
        query = head(backbone(images[0]).flatten(start_dim=1))
        with torch.no_grad():
            key = key_head(key_backbone(images[1]).flatten(start_dim=1))
        loss = criterion(query, key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def timed(step: Callable[[list[Tensor]], None], images: list[Tensor]) -> float:
    clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time  # others may be at work on a CPU
    began_s = clock()
    for _ in range(STEPS):
        step(images)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - began_s) / STEPS


def beside_lightly(_: Path) -> None:
    images = [torch.randn(BATCH, 3, SIDE, SIDE, device=DEVICE) for _ in range(2)]
    one, other = ours(), theirs()
    timed(one, images), timed(other, images)
    rounds = [(timed(one, images), timed(other, images)) for _ in range(ROUNDS)]
    ratios = sorted(b / a for a, b in rounds)
    print(
        f"MoCo v2 step, resnet18, {BATCH} x {SIDE} px, queue {QUEUE}: ours {median(a for a, _ in rounds):.3f} s, "
        f"lightly's blocks {median(b for _, b in rounds):.3f} s, ratio {median(ratios):.2f} "
        f"({ratios[0]:.2f}-{ratios[-1]:.2f} over {ROUNDS} rounds)",
        flush=True,
    )


def textured_store(workspace: Workspace, num_tiles: int = 512, tile_px: int = 256) -> TileIndex:
    noise = np.random.default_rng(0)

    def picture(slide: int, tile: int, tile_px: int) -> np.ndarray:
        return noise.integers(0, 255, (tile_px, tile_px, 3), dtype=np.uint8)

    return write_synthetic_store(workspace, ("A", "B"), num_tiles // 2, tile_px=tile_px, picture=picture)


def with_tiles_beside_without(run: Path) -> None:
    index = textured_store(Workspace(run / "store"))
    config = PretrainConfig(backbone="resnet50", weights="random", batch_size=256 if DEVICE.type == "cuda" else 16)
    shares = []
    for _ in range(3):
        loop_s, resident_s = step_times_s(
            index, Workspace(run).pretrain("x"), config, RuntimeConfig(num_workers=14), 10
        )
        shares.append(resident_s / loop_s)
    print(
        f"resnet50, 224 px, on {DEVICE.type}: {median(shares):.1%} of the rate with views that never leave the device"
    )


def memory_over_steps(run: Path, num_steps: int = 2000) -> None:
    """A small network, looks and a probe, checkpoints every 200 steps: resident memory from the tenth of the run on."""
    index = textured_store(Workspace(run / "small-tiles"), tile_px=64)
    config = PretrainConfig(backbone="test_vit", weights="random", steps=num_steps, batch_size=16, view_px=32)
    seen: list[float] = []

    def look(*_: object) -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append(pages * resource.getpagesize() / 2**20)
        return 0.0

    every = num_steps // 10
    pretrain(
        index,
        Workspace(run).pretrain("memory"),
        config,
        RuntimeConfig(
            monitor_every=every, checkpoint_every=str(every), stop_on_collapse=False
        ),  # noise teaches nothing
        probe=look,
    )
    print(
        f"resident memory over {num_steps} steps: {seen[1]:.0f} MB at a tenth, {seen[-1]:.0f} MB at the end "
        f"({seen[-1] / seen[1] - 1:+.1%}); every tenth: {', '.join(f'{mb:.0f}' for mb in seen)}",
        flush=True,
    )


def on_gpu_beside_the_original_recipe(_: Path) -> None:
    """bf16, channels-last, compiled, against plain fp32 eager: what MoCo's code does."""
    if DEVICE.type != "cuda":
        print("no GPU here: the bf16 figure is not measured")
        return
    from histossl.training.setup.optim import tune

    steps = []
    for fast in (False, True):
        backbone, info = create_backbone("resnet50", "random")
        method = MoCoV2(
            backbone, info.feature_dim, recipe_named("mocov2"), MoCoV2Config(batchnorm_group_tiles=32 if fast else 0)
        )
        method.to(DEVICE)
        if fast:
            tune(method, DEVICE, "bf16", compiled=True, deterministic=False)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01, fused=fast)
        tiles = torch.arange(256, device=DEVICE)

        def step(images: list[Tensor], method=method, optimizer=optimizer, fast=fast, tiles=tiles) -> None:
            with torch.autocast("cuda", torch.bfloat16, enabled=fast):
                outcome = method(Views(images, tiles, tiles, 0))
            optimizer.zero_grad()
            outcome.loss.backward()
            optimizer.step()
            method.after_step([outcome.carry], 0.5)

        steps.append(step)
    images = [torch.randn(256, 3, 224, 224, device=DEVICE) for _ in range(2)]
    last = [image.contiguous(memory_format=torch.channels_last) for image in images]
    timed(steps[0], images), timed(steps[1], last)
    ratios = [timed(steps[0], images) / timed(steps[1], last) for _ in range(ROUNDS)]
    print(f"resnet50 step, 256 x 224 px, bf16 channels-last compiled against fp32 eager: {median(ratios):.2f}x")


PARTS = {
    "lightly": beside_lightly,
    "tiles": with_tiles_beside_without,
    "memory": memory_over_steps,
    "gpu": on_gpu_beside_the_original_recipe,
}


def main() -> None:
    for name in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as directory:
            PARTS[name](Path(directory))


if __name__ == "__main__":
    main()
