"""What a curve costs: embedding against the plain loop of known extractors, and heads from ready embeddings.

    python tests/bench/bench_evaluate.py [embed|mean|abmil]
    python tests/bench/bench_evaluate.py suggest [--weights deit_tiny_patch16_224_in1k.pth]

embed  the same tiles of a painted slide: region by OpenSlide, Pillow's transform and an fp32 forward, one after the
       other, against `embed_slides` on tiles that are packed already. Printed: seconds of each, and what everything
       but the forward pass costs. Issue's bound: at most a tenth of the plain loop's.
mean   200 slides x 3 starts x 6 budgets x 10 draws, and the intervals, verdict and labels saved; the bound is a minute
       on two cores.
abmil  the same, projected from one start and two draws; the bound is ten minutes.
suggest  not what it costs but what it is worth: 96 painted slides of three classes, of which two are rare; from one
       labelled slide per class, 3 and 6 more by `histossl suggest` or at random (mean of 8 sets), 20 times over, in
       features of a backbone adapted to these slides as `histossl demo` does it, or of a DeiT-tiny with --weights.
       Printed: balanced accuracy on patients left out, and the difference with its standard error.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from sklearn.metrics import balanced_accuracy_score

from histossl.backbones.loading import create_backbone
from histossl.core.config import DemoConfig, EmbedConfig, TileConfig, TissueConfig
from histossl.core.workspace import Workspace
from histossl.demo.paint import paint_slide
from histossl.demo.run import BACKBONE, MPP, TILE_PX, VIEW_PX, paint_into, pretraining
from histossl.evaluation.suggest import committee, picks
from histossl.features.extraction import Bags, backbone_embedder, embed_slides, slide_tiles
from histossl.heads.feature_heads import MeanHead, head_named
from histossl.labels.label_table import Item, LabelTable
from histossl.labels.splits import groups_of, make_splits
from histossl.stats import verdict as curves
from histossl.stats.tables import Prediction
from histossl.tiles.store.index import TileIndex
from histossl.tiles.tiling import tile_archive
from histossl.training.pretrain import RuntimeConfig, pretrain

STARTS, SLIDES, BUDGETS, DRAWS, DIM, TILES = 3, 200, (1, 2, 4, 8, 16, "all"), 10, 384, 300
CPU = torch.device("cpu")


def bench_embed(folder: Path) -> None:
    import openslide
    from torchvision import transforms

    slides = folder / "slides"
    slides.mkdir()
    paint_slide(slides / "A.tif", width_px=8192, height_px=8192, mpp=0.5, label="carcinoma", seed=1)
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
    rows: list[Prediction] = []
    splits = make_splits(table, budgets=BUDGETS, num_draws=draws)
    labels, groups = table.label_numbers(), groups_of(table, "patient")
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    for start in range(starts):
        bags = Bags([(path, None) for path in files])
        for part in splits.parts:
            for budget in splits.budgets:
                train = part.taken(budget)
                fitted = head_named(head).fit(
                    bags, train, labels[train], pool=part.pool, groups=groups[train], num_classes=2, seed=part.draw
                )
                shares = fitted.predict_proba(bags, np.array(part.test))
                for item, row in zip(part.test, shares, strict=True):
                    one, said = table.items[item], table.classes[int(row.argmax())]
                    name = ("imagenet", "adapted", "random")[start]
                    rows.append(
                        Prediction(
                            name, head, budget, part.draw, None, one.name, one.patient, one.label, said, tuple(row)
                        )
                    )
    took_s, took_cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    more = STARTS * DRAWS / (starts * draws)
    print(
        f"{head}: {starts * len(splits.parts) * len(BUDGETS)} heads in {took_s:.1f} s ({took_cpu_s:.1f} s of CPU); "
        f"the whole curve {took_s * more:.0f} s ({took_cpu_s * more:.0f} s of CPU)"
    )
    if starts == STARTS:
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        measured = curves.measure(rows, table.classes, 80, 80)
        curves.summarise(measured)
        curves.verdict(measured)
        curves.labels_saved(measured, "auroc", "adapted", "imagenet")
        took_s, took_cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        print(f"intervals, verdict and labels saved: {took_s:.1f} s ({took_cpu_s:.1f} s of CPU)")


# ---- what suggestions are worth


def bench_suggest(folder: Path, weights: str = "", num_draws: int = 20) -> None:
    slides, workspace = folder / "painted", Workspace(folder / "painted-w").make()
    paint_into(slides, slides=96, seed=3)
    tile_archive(slides, workspace, TileConfig(tile_px=TILE_PX, mpp=MPP))
    index = TileIndex.open(workspace)
    names = [slide for slide in index.slides if len(slide_tiles(index, slide))]
    if weights:
        embedder = backbone_embedder("imagenet", *create_backbone("deit_tiny_patch16_224", weights), 96, CPU)
    else:
        run, settings = workspace.pretrain("adapted"), pretraining(DemoConfig())
        pretrain(index, run, settings, RuntimeConfig(num_workers=1))
        backbone = create_backbone(BACKBONE, str(run.backbone))
        embedder = backbone_embedder("adapted", *backbone, VIEW_PX, CPU)
    files = embed_slides(workspace, index, names, embedder, EmbedConfig())
    x = Bags([(files[name], None) for name in names]).pooled
    with (slides / "labels.csv").open() as file:
        told = {row["slide"]: (row["label"], row["patient"]) for row in csv.DictReader(file)}
    classes = sorted({label for label, _ in told.values()})
    labels = np.array([classes.index(told[name][0]) for name in names])
    patients = np.unique([told[name][1] for name in names], return_inverse=True)[1]

    def accuracy(known: np.ndarray, test: np.ndarray) -> float:
        bags, everything = _Pooled(x), np.arange(len(x))
        learnt = {"pool": everything, "groups": patients[known], "num_classes": len(classes), "seed": 0}
        fitted = MeanHead().fit(bags, known, labels[known], **learnt)
        return float(balanced_accuracy_score(labels[test], fitted.predict_proba(bags, test).argmax(1)))

    gains: dict[int, list[tuple[float, float]]] = {3: [], 6: []}
    for draw in range(num_draws):
        rng = np.random.default_rng([draw, 9])
        tested = rng.permutation(patients.max() + 1)[:16]  # a third of the patients
        test, rest = (
            np.flatnonzero(np.isin(patients, tested)),
            rng.permutation(np.flatnonzero(~np.isin(patients, tested))),
        )
        common = draw % len(classes)  # of the others, a quarter is kept: archives are not balanced
        kept = [
            own if label == common else own[: len(own) // 4]
            for label in range(len(classes))
            for own in [rest[labels[rest] == label]]
        ]
        begun = np.array([own[0] for own in kept])
        pool = np.concatenate([own[1:] for own in kept])
        shares = committee(x[begun], labels[begun], patients[begun], x[pool], len(classes), draw)
        found = picks(
            x[begun], x[pool], shares, max(gains),
            labelled_names=[names[item] for item in begun], names=[str(item) for item in pool], classes=classes,
        )  # fmt: skip
        ours = np.array([int(one.slide) for one in found])
        by_chance = [rng.permutation(pool) for _ in range(8)]  # one set of random picks is mostly luck
        for number, pairs in gains.items():
            scores = [accuracy(np.concatenate([begun, some[:number]]), test) for some in (ours, *by_chance)]
            pairs.append((scores[0], float(np.mean(scores[1:]))))
    for number, pairs in gains.items():
        both = np.array(pairs)
        gain = both[:, 0] - both[:, 1]
        print(
            f"suggest: 3 labelled slides and {number} more, {num_draws} draws: suggested {both[:, 0].mean():.3f}, "
            f"random {both[:, 1].mean():.3f}; difference {gain.mean():+.3f} (standard error "
            f"{gain.std(ddof=1) / np.sqrt(num_draws):.3f}), better in {(gain > 0).sum()}, worse in {(gain < 0).sum()}"
        )


class _Pooled:
    def __init__(self, pooled: np.ndarray) -> None:
        self.pooled = pooled

    def tiles(self, item: int) -> np.ndarray:
        return self.pooled[item : item + 1].astype(np.float32)


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["embed", "mean", "abmil"]
    with tempfile.TemporaryDirectory() as name:
        if "embed" in wanted:
            bench_embed(Path(name))
        if "mean" in wanted:
            bench_heads(Path(name), "mean", STARTS, DRAWS)
        if "suggest" in wanted:
            bench_suggest(Path(name), wanted[wanted.index("--weights") + 1] if "--weights" in wanted else "")
        if "abmil" in wanted:
            bench_heads(Path(name), "abmil", 1, 2)
