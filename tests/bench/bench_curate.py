"""Time and peak memory of curating ready features: copies, balance and retrieval. Random clustered vectors.

    python tests/bench/bench_curate.py [TILES] [--tmp DIR]        default: 1,000,000 tiles of 384 features
    python tests/bench/bench_curate.py painted [--tmp DIR] [--weights DEIT_TINY.pth]

2,000 kinds whose frequency falls like a Zipf law; 2 % of the tiles are copies of others with noise. The features' file
(1.3 GB for a million) is written first, and neither its time nor its memory is counted. Peak memory is that of the
process (VmHWM), mapped pages of the file included.

`painted`: slides painted, tiled and curated by the commands, as a user would, with some slides there a second time,
encoded anew. Told: copies found, others dropped, and what balancing made of the kinds beside what chance would. With
DeiT-tiny's weights at 64 px, else with a ResNet-10t that has learnt nothing. Two sorts of archives:

    kinds      tests/painted_kinds.py, three paintings: one common kind and four rare ones, 109:1, which look nothing
               alike (told: own kind of the nearest five; the kind's spread and how far its mean is from the common's)
    classes    the demo's three classes 100:1, **by slide**: most tiles of a carcinoma slide are the stroma of any slide
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from painted_kinds import KINDS as KINDS_PAINTED
from painted_kinds import kind_of_tiles, paint_kinds

from histossl.cli import main as histossl
from histossl.core.workspace import Workspace
from histossl.curation.faiss_kmeans import nearest
from histossl.curation.features import PICTURE, features_of, release
from histossl.curation.hierarchical_kmeans import balanced, clusters_for, tree_of
from histossl.curation.near_duplicates import find_copies
from histossl.curation.retrieve import retrieve
from histossl.demo.paint import CLASSES, paint_slide
from histossl.tiles.store.index import TileIndex
from histossl.tiles.store.subset import open_subset

DIM, KINDS, COPIED, PIECE = 384, 2000, 0.02, 50_000
PAINTED = (("normal", 12, 1024), ("adenoma", 2, 720), ("carcinoma", 1, 320))  # class, slides, their side in pixels
KEPT, SEEDS = (60, 100, 150), 3
Truth = Callable[[TileIndex], np.ndarray]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def written(path: Path, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(the file, kind of each tile, what each copy is a copy of). The last 2 % are copies of the first."""
    rng = np.random.default_rng(0)
    kinds = unit(rng.normal(size=(KINDS, DIM))).astype(np.float32)
    frequency = 1 / np.arange(1, KINDS + 1)
    of_kind = rng.choice(KINDS, num, p=frequency / frequency.sum())
    copied = int(COPIED * num)
    originals = rng.choice(num - copied, copied, replace=False)
    of_kind[num - copied :] = of_kind[originals]
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(num, DIM + PICTURE))
    for first in range(0, num, PIECE):
        size = min(PIECE, num - first)
        shown = kinds[of_kind[first : first + size]] + rng.normal(size=(size, DIM)).astype(np.float32) * 0.7 / DIM**0.5
        table[first : first + size, :DIM] = unit(shown)
        table[first : first + size, DIM:] = unit(rng.normal(size=(size, PICTURE)).astype(np.float32))
    for first in range(0, copied, PIECE):
        source = table[originals[first : first + PIECE]].astype(np.float32)
        noise = rng.normal(size=source.shape).astype(np.float32) * 0.01
        here = slice(num - copied + first, num - copied + first + len(source))
        table[here, :DIM], table[here, DIM:] = unit((source + noise)[:, :DIM]), unit((source + noise)[:, DIM:])
    table.flush()
    release(table)
    return table, of_kind, originals


def peak_gb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def timed(what: str, function: Callable[[], object]) -> object:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    began_s, cpu_s = time.perf_counter(), time.process_time()
    found = function()
    took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    print(f"{what}: {took_s:.0f} s, {cpu_s:.0f} s of CPU, peak {peak_gb():.2f} GB", flush=True)
    return found


def painted(folder: Path, weights: str) -> None:
    for seed in range(3):
        curated(folder / f"kinds-{seed}", weights, f"kinds, painting {seed}", KINDS_PAINTED, kinds_archive, seed)
    curated(folder / "classes", weights, "classes", CLASSES, classes_archive, 0)


def kinds_archive(slides: Path, seed: int) -> Truth:
    of_cell = {}
    for number in range(10):
        again = [("", "jpeg"), ("-again", "deflate")] if number == 0 else [("", "jpeg")]
        for suffix, compression in again:
            name = f"{number}{suffix}"
            of_cell[name] = paint_kinds(slides / f"{name}.tif", 100 * seed + number, 2, compression)
    return lambda index: kind_of_tiles(index, {slide: of_cell[Path(slide).stem] for slide in index.slides})


def classes_archive(slides: Path, seed: int) -> Truth:
    for label, count, side_px in PAINTED:
        for number in range(count):
            again = [("", "jpeg"), ("-again", "deflate")] if label == "normal" and number < 2 else [("", "jpeg")]
            for name, compression in again:
                path = slides / f"{label}-{number}{name}.tif"
                paint_slide(path, width_px=side_px, height_px=side_px, label=label, seed=seed, compression=compression)
            seed += 1
    return lambda index: np.array([CLASSES.index(slide.split("-")[0]) for slide in slides_of(index)])


def slides_of(index: TileIndex) -> np.ndarray:
    return np.array(index.slides)[index.slide_of(np.arange(len(index)))]


def curated(
    folder: Path, weights: str, what: str, names: Sequence[str], paint: Callable[[Path, int], Truth], seed: int
) -> None:
    slides, place = folder / "slides", Workspace.at(folder / "workspace")
    slides.mkdir(parents=True)
    truth = paint(slides, seed)
    where = ("-w", str(place.root))
    histossl(["tile", "--slides", str(slides), *where, "--tile-px", "64", "--mpp", "0.5", "--grid", "physical"])
    net = ("deit_tiny_patch16_224", weights, "64", "0.9") if weights else ("resnet10t", "random", "32", "0.94")
    options = ("--backbone", "--weights", "--input-px", "--duplicate-cosine")
    embed = [word for pair in zip(options, net, strict=True) for word in pair]
    histossl(["curate", *where, "--name", "copies", *embed])
    for tiles in KEPT:
        for turn in range(SEEDS):
            balance = ["--tiles", str(tiles), "--seed", str(turn), "--name", f"kept-{tiles}-{turn}"]
            histossl(["curate", *where, *embed, *balance])
    index = TileIndex.open(place)
    numbers = np.arange(len(index))
    slide_of, of_kind = slides_of(index), truth(index)
    at = [
        (slide.replace("-again", ""), *xy)
        for slide, xy in zip(slide_of, index.coords_l0(numbers).tolist(), strict=True)
    ]
    pairs = {key: [n for n in numbers if at[n] == key] for key in set(at)}
    twice = [both for both in pairs.values() if len(both) == 2]
    kept = open_subset(index, "copies").tiles
    dropped = set(numbers.tolist()) - set(kept.tolist())
    found = np.mean([bool(dropped & set(both)) for both in twice])
    false = len(dropped) - sum(min(1, len(dropped & set(both))) for both in twice)
    print(f"{what}: {len(index):,} tiles, {net[0]}: {found:.2%} of {len(twice)} copies found, ", end="")
    print(f"{false / len(index):.2%} of all dropped besides")
    tell_apart(place, kept, of_kind[kept], names)
    before = np.bincount(of_kind[kept], minlength=len(names))
    print(f"  {dict(zip(names, before.tolist(), strict=True))}: {before.max() / before.min():.0f}:1")
    for tiles in KEPT:
        afters = [
            np.bincount(of_kind[open_subset(index, f"kept-{tiles}-{turn}").tiles], minlength=len(names))
            for turn in range(SEEDS)
        ]
        ratios = ", ".join(f"{after.max() / max(0.5, after.min()):.1f}" for after in afters)  # none counts as a half
        drawn = before / before.sum() * tiles
        print(f"  {tiles} kept: mean {np.mean(afters, 0).round(1)}, {ratios} to 1; by chance {drawn.round(1)}")


def tell_apart(place: Workspace, kept: np.ndarray, of_kind: np.ndarray, names: Sequence[str]) -> None:
    """How far the question can be answered: own kind of the nearest five tiles, spread, distance from the common."""
    path = json.loads(place.subset("copies").ledger.read_text())["features"]
    x = unit(np.load(path)[kept][:, :-PICTURE].astype(np.float32))
    _, near = nearest(x, x, 6)
    own = (of_kind[near[:, 1:]] == of_kind[:, None]).mean(1)
    common = x[of_kind == np.bincount(of_kind).argmax()].mean(0)
    for kind, name in enumerate(names):
        here = x[of_kind == kind]
        spread = ((here - here.mean(0)) ** 2).sum(1).mean() ** 0.5
        away = np.linalg.norm(here.mean(0) - common)
        print(f"  {name}: own kind of the nearest five {own[of_kind == kind].mean():.0%}, ", end="")
        print(f"spread {spread:.2f}, its mean {away:.2f} from the common kind's")


def _after(option: str) -> str | None:
    return sys.argv[sys.argv.index(option) + 1] if option in sys.argv else None


def main() -> None:
    if "painted" in sys.argv:
        with tempfile.TemporaryDirectory(dir=_after("--tmp")) as folder:
            painted(Path(folder), _after("--weights") or "")
        return
    given = [word for word in sys.argv[1:] if word.isdecimal()]
    num = int(given[0]) if given else 1_000_000
    where = _after("--tmp")
    with tempfile.TemporaryDirectory(dir=where) as folder:
        table, of_kind, originals = written(Path(folder) / "features.npy", num)
        numbers = np.arange(num)
        features = features_of(table, numbers)
        print(f"{num:,} tiles, {DIM} + {PICTURE} values, {torch.get_num_threads()} threads", flush=True)
        copies = timed("copies", lambda: find_copies(features, numbers, 0.9, 0, torch.device("cpu")))
        planted = np.arange(num - len(originals), num)
        found = (copies.stands_for[planted] == copies.stands_for[originals]).mean()
        false = copies.dropped.sum() - copies.dropped[planted].sum()
        print(f"  {found:.2%} of {len(planted):,} planted copies found, {false} others dropped")
        kept = numbers[~copies.dropped]
        clusters = clusters_for(len(kept))
        tree = timed(f"balance {clusters}", lambda: tree_of(features.as_given, kept, clusters, 0))
        chosen = kept[balanced(tree, kept, num // 10, 0)]
        for when, tiles in (("before", kept), ("after", chosen)):
            counts = np.bincount(of_kind[tiles], minlength=KINDS)
            print(
                f"  {when}: the most frequent kind holds {counts.max() / counts.sum():.2%} of the tiles,"
                f" the rarer half of the kinds {counts[KINDS // 2 :].sum() / counts.sum():.2%}"
            )
        timed("retrieve 1,000 examples", lambda: retrieve(features.shown, kept[:1000], kept[1000:], num // 20))


if __name__ == "__main__":
    main()
