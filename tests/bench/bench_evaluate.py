"""What a curve costs: embedding against the plain loop of known extractors, and heads from ready embeddings.

    python tests/bench/bench_evaluate.py [embed|mean|abmil]

embed  the same tiles of a painted slide: region by OpenSlide, Pillow's transform and an fp32 forward, one after the
       other, against `embed_slides` on tiles that are packed already. Printed: seconds of each, and what everything
       but the forward pass costs. Issue's bound: at most a tenth of the plain loop's.
mean   200 slides x 3 starts x 6 budgets x 10 draws; the bound is a minute on two cores.
abmil  the same, projected from one start and two draws; the bound is ten minutes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

from histossl.backbones import create_backbone
from histossl.config import EmbedConfig, TileConfig, TissueConfig
from histossl.demo.paint import paint_slide
from histossl.evaluation.embed import Bags, backbone_embedder, embed_slides
from histossl.evaluation.heads import head_named
from histossl.evaluation.labels import Item, LabelTable
from histossl.evaluation.splits import groups_of, make_splits
from histossl.tiles.index import TileIndex
from histossl.tiles.tiling import tile_archive
from histossl.workspace import Workspace

STARTS, SLIDES, BUDGETS, DRAWS, DIM, TILES = 3, 200, (1, 2, 4, 8, 16, "all"), 10, 384, 300


def bench_embed(folder: Path) -> None:
    import openslide
    from torchvision import transforms

    slides = folder / "slides"
    slides.mkdir()
    paint_slide(slides / "A.tif", width_px=4096, height_px=4096, mpp=0.5, label="carcinoma", seed=1)
    workspace = Workspace(folder / "w").make()
    tile_archive(slides, workspace, TileConfig(tile_px=256, grid="physical", tissue=TissueConfig(min_tissue=0.3)), 1)
    index = TileIndex.open(workspace)
    coords = index.coords_l0(np.arange(len(index)))
    backbone, info = create_backbone("deit_tiny_patch16_224", "random")
    backbone.eval()
    prepare = transforms.Compose(
        [transforms.Resize(224), transforms.ToTensor(), transforms.Normalize(info.mean, info.std)]
    )
    forward_s = [0.0, 0.0]

    def timed(slot: int, function):  # type: ignore[no-untyped-def]
        def call(x: torch.Tensor) -> torch.Tensor:
            began_s = time.perf_counter()
            out = function(x)
            forward_s[slot] += time.perf_counter() - began_s
            return out

        return call

    plain = timed(0, backbone)
    began_s = time.perf_counter()
    opened = openslide.OpenSlide(slides / "A.tif")
    with torch.inference_mode():
        for first in range(0, len(coords), 64):
            tiles = [
                prepare(opened.read_region((int(x), int(y)), 0, (256, 256)).convert("RGB"))
                for x, y in coords[first : first + 64]
            ]
            plain(torch.stack(tiles))
    plain_s = time.perf_counter() - began_s

    class Timed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = backbone

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return timed(1, self.inner)(x)

    embedder = backbone_embedder("bench", Timed(), info, 224, torch.device("cpu"))
    began_s = time.perf_counter()
    embed_slides(workspace, index, index.slides, embedder, EmbedConfig())
    ours_s = time.perf_counter() - began_s
    around = plain_s - forward_s[0], ours_s - forward_s[1]
    print(
        f"embed: {len(index)} tiles, {torch.get_num_threads()} threads; plain loop {plain_s:.1f} s of which forward "
        f"{forward_s[0]:.1f}, ours {ours_s:.1f} s of which forward {forward_s[1]:.1f}; "
        f"around the forward pass {around[0]:.2f} against {around[1]:.2f} s: {around[0] / around[1]:.1f}x"
    )


def archive(folder: Path) -> tuple[list[Path], LabelTable]:
    rng = np.random.default_rng(0)
    items, files = [], []
    centres = rng.normal(size=(2, DIM)) * 0.3
    for number in range(SLIDES):
        features = (rng.normal(size=(TILES, DIM)) + centres[number % 2]).astype(np.float32)
        path = folder / f"s{number}.h5"
        with h5py.File(path, "w") as file:
            file["features"], file["mean"] = features, features.mean(0)
        files.append(path)
        name, split = f"s{number}", "test" if number % 5 == 0 else "train"
        items.append(Item(name, name, f"c{number % 2}", f"P{number}", split=split))
    return files, LabelTable(tuple(items), ("c0", "c1"))


def bench_heads(folder: Path, head: str, starts: int, draws: int) -> None:
    files, table = archive(folder)
    splits = make_splits(table, budgets=BUDGETS, num_draws=draws)
    labels, groups = table.label_numbers(), groups_of(table, "patient")
    began_s = time.perf_counter()
    for _ in range(starts):
        bags = Bags([(path, None) for path in files])
        for part in splits.parts:
            for budget in splits.budgets:
                train = part.taken(budget)
                fitted = head_named(head).fit(
                    bags, train, labels[train], pool=part.pool, groups=groups[train], num_classes=2, seed=part.draw
                )
                fitted.predict_proba(bags, np.array(part.test))
    took_s = time.perf_counter() - began_s
    whole_s = took_s * STARTS * DRAWS / (starts * draws)
    print(
        f"{head}: {starts * len(splits.parts) * len(BUDGETS)} heads in {took_s:.1f} s; the whole curve {whole_s:.0f} s"
    )


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["embed", "mean", "abmil"]
    with tempfile.TemporaryDirectory() as name:
        if "embed" in wanted:
            bench_embed(Path(name))
        if "mean" in wanted:
            bench_heads(Path(name), "mean", STARTS, DRAWS)
        if "abmil" in wanted:
            bench_heads(Path(name), "abmil", 1, 2)
