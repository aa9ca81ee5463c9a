"""What a tile becomes: recipes of views, and `make_views`, which makes them for a whole batch on the tiles' device.

    recipe = recipe_named("mocov2-histology", size_px=224)
    query, key = make_views(tiles, recipe, seed=0, positions=positions)     # float in [0, 1], not yet normalised

A view is made in this order, each op for the samples that its probability picks:

    JPEG once more -> crop, mirror, flip, turn, rotation (one resampling) -> stain jitter
    -> brightness, contrast, saturation, hue, greyscale (one matrix) -> blur -> solarize

The papers mirror before or after the colours, and jitter in a random order: here neither makes a difference (see
colour.py). Stain comes first of the colours because it is what lies on the glass; the rest is what a camera does.

Shapes: B tiles, V views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from histossl.core.errors import UsageError
from histossl.core.options import nearest
from histossl.views import colour, geometry, jpeg
from histossl.views.rng import Draws, Floats

CPU_PIXELS = 2**18  # of a view at a time on the CPU (5 tiles at 224 px): what they become stays in its caches


@dataclass(frozen=True)
class ViewSpec:
    """The distributions of one view. Factors: 0.4 means 0.6..1.4 times; `*_p` is the share of samples it happens to."""

    size_px: int = 224
    scale: tuple[float, float] = (0.2, 1.0)  # share of the tile's area that the crop covers
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of the crop
    interpolation: str = "bilinear"  # or bicubic; rotated freely, a view is bilinear all the same
    mirror_p: float = 0.5  # left and right
    flip_p: float = 0.0  # top and bottom
    quarter_turns: bool = False  # each of 0, 90, 180, 270 degrees as often
    rotation_deg: float = 0.0  # any angle up to this; one blur more, and mirrored corners
    stain_p: float = 0.0
    stain_shift: float = 0.0  # sigma of a shift of each stain, in nats of optical density
    stain_scale: float = 0.0  # sigma of a relative change of each stain
    jitter_p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # share of the full circle, to both sides
    grey_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the view, uniform
    solarize_p: float = 0.0
    solarize_threshold: float = 128 / 255
    jpeg_p: float = 0.0
    jpeg_quality: tuple[int, int] = (40, 95)

    def __post_init__(self) -> None:
        def must(holds: bool, name: str, wanted: str) -> None:
            if not holds:
                raise UsageError(f"view setting {name} = {getattr(self, name)}: must be {wanted}")

        must(8 <= self.size_px <= 4096, "size_px", "a side of 8 to 4096 pixels")
        must(0 < self.scale[0] <= self.scale[1] <= 1, "scale", "two shares of the tile's area, 0 < low <= high <= 1")
        must(0 < self.ratio[0] <= self.ratio[1], "ratio", "two ratios, 0 < low <= high")
        must(self.interpolation in geometry.FILTER_RADIUS, "interpolation", "bilinear or bicubic")
        must(0 <= self.rotation_deg <= 180, "rotation_deg", "an angle of 0 to 180 degrees")
        must(0 <= self.hue <= 0.5, "hue", "0 to 0.5 of the full circle")
        must(0 <= self.blur_sigma[0] <= self.blur_sigma[1], "blur_sigma", "two widths in pixels, 0 <= low <= high")
        must(1 <= self.jpeg_quality[0] <= self.jpeg_quality[1] <= 100, "jpeg_quality", "two qualities, 1 to 100")
        for name in ("brightness", "contrast", "saturation", "stain_shift", "stain_scale"):
            must(getattr(self, name) >= 0, name, "0 or more")
        for name in ("mirror_p", "flip_p", "stain_p", "jitter_p", "grey_p", "blur_p", "solarize_p", "jpeg_p"):
            must(0 <= getattr(self, name) <= 1, name, "a probability, 0 to 1")


@dataclass(frozen=True)
class ViewRecipe:
    """The views of a tile, in the order in which the method gets them (global crops first)."""

    name: str
    views: tuple[ViewSpec, ...]

    def __post_init__(self) -> None:
        if not self.views:
            raise UsageError(f"recipe {self.name!r}: has no views")

    def with_all(self, **settings: object) -> ViewRecipe:
        """The same with some settings changed in every view."""
        unknown = [name for name in settings if name not in ViewSpec.__dataclass_fields__]
        if unknown:
            raise UsageError(f"no view setting {unknown[0]!r}{nearest(unknown[0], ViewSpec.__dataclass_fields__)}")
        return replace(self, views=tuple(replace(view, **settings) for view in self.views))  # type: ignore[arg-type]


def with_settings(recipe: ViewRecipe, assignments: Sequence[str]) -> ViewRecipe:
    """`--view-set key=value`: settings changed in every view of the recipe. Ranges are written low,high."""
    defaults = ViewSpec()
    settings: dict[str, object] = {}
    for assignment in assignments:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        key = key.replace("-", "_")
        known = [name for name in ViewSpec.__dataclass_fields__ if name != "size_px"]  # --view-px sets it
        if not equals or key not in known:
            what = "must be KEY=VALUE" if not equals else f"there is no {key!r}{nearest(key, known)}"
            raise UsageError(f"--view-set {assignment}: {what}; known: {', '.join(sorted(known))}")
        default = getattr(defaults, key)
        try:
            settings[key] = _read_as(default, text)
        except ValueError as error:
            wanted = "two numbers, low,high" if isinstance(default, tuple) else f"a {type(default).__name__}"
            raise UsageError(f"--view-set {assignment}: must be {wanted}") from error
    return recipe.with_all(**settings)


def _read_as(default: object, text: str) -> object:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if isinstance(default, tuple):
        low, high = text.split(",")
        return type(default[0])(low), type(default[1])(high)
    return type(default)(text)  # type: ignore[call-arg]


# ---- the recipes of the papers

MOCOV2 = ViewSpec()
"""He et al.'s MoCo v2 (facebookresearch/moco, --aug-plus): the defaults of ViewSpec. Bilinear, sigma uniform in 0.1..2.

Pillow's GaussianBlur, used there, is three box filters; ours is the Gaussian they stand for.
"""

MOCOV1 = replace(MOCOV2, jitter_p=1.0, hue=0.4, blur_p=0.0)
"""MoCo v1: greyscale *before* jitter 0.4/0.4/0.4/0.4, always jittered, no blur.

Grey first and grey last are the same image, as every op of the jitter keeps grey and commutes with the luma.
"""

SIMCLR = replace(
    MOCOV2, scale=(0.08, 1.0), interpolation="bicubic", brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2
)
"""SimCLR at colour strength 1 (google-research/simclr): jitter 0.8/0.8/0.8/0.2, blur p 0.5.

Decided: contrast about the mean luma (PyTorch ports), not about each channel's mean (TensorFlow's op); brightness
multiplies (as in v2's code), for v1's added shift exists in no other recipe; the blur is not cut off at a kernel of a
tenth of the image.
"""

DINO_GLOBAL = replace(MOCOV2, scale=(0.25, 1.0), interpolation="bicubic", saturation=0.2, blur_p=1.0)
DINO_LOCAL = replace(DINO_GLOBAL, scale=(0.05, 0.25), blur_p=0.5)
"""DINO: jitter 0.4/0.4/0.2/0.1 p 0.8, grey 0.2; blur p 1, 0.1 and 0.5 on the first global, the second and the locals;
solarize p 0.2 on the second global.

Decided: crops of the published long runs (0.25..1 and 0.05..0.25), not the code's default (0.4..1 and 0.05..0.4);
8 locals, as the code (the paper's 10 are `num_local=10`).
"""

MOCOV3 = replace(DINO_GLOBAL, scale=(0.08, 1.0))
"""MoCo v3, after BYOL: jitter 0.4/0.4/0.2/0.1 p 0.8, grey 0.2; blur p 1 and 0.1 and solarize p 0.2 as DINO's globals.

Decided: crops of its ViTs (0.08..1); its ResNet-50 has 0.2..1.
"""

DINOV2_GLOBAL = replace(DINO_GLOBAL, scale=(0.32, 1.0))
DINOV2_LOCAL = replace(DINO_LOCAL, scale=(0.05, 0.32))
"""DINOv2: DINO's with crops 0.32..1 and 0.05..0.32.

Decided: blur p 1 / 0.1 / 0.5 as the paper says. The released code inverts the probability (0 / 0.9 / 0.5), and the
released weights were trained so: `dinov2-released` does the same, for who continues them and wants their views.
"""


PLAIN = replace(MOCOV2, ratio=(1.0, 1.0), jitter_p=0.0, grey_p=0.0, blur_p=0.0)
PRETEXT = {
    "rotation": replace(PLAIN, scale=(0.77, 0.77)),
    "context": replace(PLAIN, scale=(0.76, 0.76), grey_p=0.66),
    "jigsaw": replace(PLAIN, scale=(0.99, 0.99), grey_p=0.66),
    "colorization": replace(PLAIN, scale=(0.47, 0.47)),
}
"""The pretext tasks' one view: a square crop of a fixed share, mirrored left and right, and nothing else but grey.

Crops: 224 of 256 (RotNet), 255 of 292 (Google's context), 255 of 256 (VISSL's jigsaw), 176 of 256 (Zhang). Two of
three grey, so that chromatic aberration tells no patch's place (VISSL and Google; Doersch drops channels instead).
"""

DISTILLATION = replace(MOCOV2, scale=(0.08, 1.0), interpolation="bicubic", jitter_p=0.0, grey_p=0.0, blur_p=0.0)
"""SimCLR v2's distillation: crop and mirror alone (Chen et al. 2020, arXiv 2006.10029), as when it learns labels."""


def _dino(first: ViewSpec, local: ViewSpec, blur_p: tuple[float, float], num_local: int) -> tuple[ViewSpec, ...]:
    second = replace(first, blur_p=blur_p[1], solarize_p=0.2)
    return (replace(first, blur_p=blur_p[0]), second, *[local] * num_local)


def _views(method: str, num_local: int) -> tuple[ViewSpec, ...] | None:
    return {
        "mocov1": (MOCOV1, MOCOV1),
        "mocov2": (MOCOV2, MOCOV2),
        "mocov3": _dino(MOCOV3, MOCOV3, (1.0, 0.1), 0),
        "simclr": (SIMCLR, SIMCLR),
        "dino": _dino(DINO_GLOBAL, DINO_LOCAL, (1.0, 0.1), num_local),
        "dinov2": _dino(DINOV2_GLOBAL, DINOV2_LOCAL, (1.0, 0.1), num_local),
        "dinov2-released": _dino(DINOV2_GLOBAL, DINOV2_LOCAL, (0.0, 0.9), num_local),
        **{name: (view,) for name, view in PRETEXT.items()},
        "distillation": (DISTILLATION,),
    }.get(method)


METHODS = ("mocov1", "mocov2", "mocov3", "simclr", "dino", "dinov2", "dinov2-released", *PRETEXT, "distillation")
HISTOLOGY = "-histology"
RECIPES = (*METHODS, *(method + HISTOLOGY for method in METHODS))


def histology(view: ViewSpec) -> ViewSpec:
    """What tissue wants of any recipe.

    Tissue has no up: flips and quarter turns (without them -0.6 points in nanopath's ablation). Stain jitter is the op
    that matters most there (-3.4 points without). Hue off (on: -0.3), solarize off (left out by Virchow2 and
    OpenMidnight: inverted tissue does not exist), colour jitter at most 0.4 (0.4 and more: -0.4, 0.3: +0.2), blur on
    half of the views at most: the texture of nuclei is what there is to learn.

    Stain sigma 0.15 nats moves the RGB of colon tiles by 20 of 255 levels on average, between what is called light (15)
    and strong (52) in Tellez-era code; nanopath found 0.83 nats best, where we see tiles wash out to white.
    """
    return replace(
        view,
        flip_p=0.5,
        quarter_turns=True,
        stain_p=0.8,
        stain_shift=0.15,
        stain_scale=0.15,
        brightness=min(view.brightness, 0.4),
        contrast=min(view.contrast, 0.4),
        saturation=min(view.saturation, 0.4),
        hue=0.0,
        blur_p=min(view.blur_p, 0.5),
        solarize_p=0.0,
    )


def pretext_histology(method: str, view: ViewSpec) -> ViewSpec:
    """What tissue wants of a pretext task, as far as the answer stays in the picture.

    Crops of several sizes, and JPEG once more for a quarter of the tiles, hide the tile's own compression grid. A
    rotation is told by nothing that turned or flipped before it. Patches keep their places in a tile that turns as a
    whole, which takes away the direction of shading. Colours that are asked for stay as they are.
    """
    view = replace(histology(replace(view, jitter_p=0.8, blur_p=0.3)), scale=(0.5, 1.0), jpeg_p=0.25)
    if method == "rotation":
        return replace(view, flip_p=0.0, quarter_turns=False)
    if method == "colorization":
        return replace(view, stain_p=0.0, jitter_p=0.0, blur_p=0.0)
    return view


def labelled_tissue(view: ViewSpec) -> ViewSpec:
    """What tissue wants where a model labels the view: it knows whole tiles at one scale, stained as they came.

    A crop covers half of the tile at least, and there is no stain jitter: to label recoloured tissue was never learnt.
    """
    return replace(histology(view), scale=(0.5, 1.0), stain_p=0.0, stain_shift=0.0, stain_scale=0.0)


def recipe_named(name: str, size_px: int = 224, local_px: int | None = None, num_local: int = 8) -> ViewRecipe:
    """A recipe of `RECIPES`: a paper's, or with "-histology" what tissue wants of it.

    `local_px` is the side of DINO's small crops: 96 at 224, and in that proportion; `num_local` their number.
    """
    method = name.removesuffix(HISTOLOGY)
    views = _views(method, num_local)
    if views is None:
        raise UsageError(
            f"--recipe {name}: no such recipe{nearest(name, RECIPES)} (there are {', '.join(METHODS)}; "
            f'each also with "{HISTOLOGY}" for tissue)'
        )
    small_px = local_px or max(16, round(size_px * 96 / 224 / 16) * 16)
    sized = [replace(view, size_px=size_px if number < 2 else small_px) for number, view in enumerate(views)]
    if name == method:
        return ViewRecipe(name, tuple(sized))
    if method == "distillation":
        return ViewRecipe(name, tuple(labelled_tissue(view) for view in sized))
    return ViewRecipe(name, tuple(pretext_histology(method, v) if method in PRETEXT else histology(v) for v in sized))


# ---- making them


@torch.no_grad()
def make_views(
    tiles: Tensor,
    recipe: ViewRecipe,
    seed: int,
    positions: Tensor,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
) -> list[Tensor]:
    """tiles uint8 (B, 3, H, H) -> V float tensors (B, 3, h, h) in [0, 1], on the tiles' device.

    With `statistics` (mean, std) they come normalised by them, which is cheaper here than afterwards.

    `positions` (B,) int64, the tiles' places in the global stream, on the CPU: with the seed they are all that the
    randomness depends on, so the views do not depend on how the stream is cut into batches and processes.
    """
    if tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[1] != 3 or tiles.shape[2] != tiles.shape[3]:
        raise ValueError(f"tiles must be uint8 (B, 3, H, H), not {tiles.dtype} {tuple(tiles.shape)}")
    place = positions.cpu().numpy()
    plans = [planned(view, Draws(seed, place, number), tiles.shape[2]) for number, view in enumerate(recipe.views)]
    on_cpu = tiles.device.type == "cpu"
    made = [_room((len(tiles), 3, view.size_px, view.size_px), tiles.device) for view in recipe.views]
    chunk = max(1, CPU_PIXELS // max(view.size_px for view in recipe.views) ** 2) if on_cpu else max(1, len(tiles))

    def make(rows: slice) -> None:
        pixels = _as_float(tiles[rows])
        for views, plan in zip(made, plans, strict=True):
            _make(tiles[rows], pixels, plan.of(rows), views[rows])
            if statistics is not None:
                shift, scale = _statistics(*(tuple(each) for each in statistics), tiles.device)
                views[rows].mul_(scale).add_(shift)

    with _in_float32(tiles.device):
        chunks = [slice(first, first + chunk) for first in range(0, len(tiles), chunk)]
        if on_cpu and len(chunks) > 1 and torch.get_num_threads() > 1:
            _side_by_side(make, chunks)
        else:
            for rows in chunks:
                make(rows)
    return made


@contextmanager
def _in_float32(device: torch.device) -> Iterator[None]:
    """Whoever calls: colours want neither autocast nor TF32, which would move them by about a level."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _side_by_side(make: Callable[[slice], None], chunks: Sequence[slice]) -> None:
    """Each core makes whole chunks. Torch's own way, all cores on one small op after another, waits after each op for
    the slowest: with other work on the same two cores (a loader is some) that was ten times slower than one core alone.
    """
    num_threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def alone(rows: slice) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # both belong to a thread
            make(rows)

    try:
        with ThreadPoolExecutor(min(num_threads, len(chunks)), "views", torch.set_num_threads, (1,)) as pool:
            for _ in pool.map(alone, chunks):
                pass
    finally:
        torch.set_num_threads(num_threads)


def _room(shape: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type == "cpu":
        # NumPy's large arrays come in huge pages: filling a fresh torch.empty costs as much in page faults as a view.
        return torch.from_numpy(np.empty(shape, np.float32))
    return torch.empty(shape, device=device)


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std by channel: x (B, 3, h, w) in [0, 1]. Continuing keeps the statistics of the start's weights."""
    shift, scale = _statistics(tuple(mean), tuple(std), x.device)
    return torch.addcmul(shift, x, scale)


@lru_cache(maxsize=16)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """-mean / std and 1 / std on the device: brought there once, for a transfer would make each step wait."""
    with torch.inference_mode(False):  # kept: who asked first must not decide what they are good for
        spread = torch.tensor(std, device=device)[:, None, None]
        return -torch.tensor(mean, device=device)[:, None, None] / spread, 1 / spread


def clean_view(
    tiles: Tensor, size_px: int, statistics: tuple[Sequence[float], Sequence[float]] | None = None
) -> Tensor:
    """The whole tile at another size, antialiased: uint8 (B, 3, H, H) -> float (B, 3, h, h) in [0, 1].

    With `statistics` (mean, std) it comes normalised by them. On the CPU it is resized as bytes, which is what Pillow
    does: 20 times as quick as in floats, and within a level of them. What comes out then lies channels-last.
    """
    if tiles.device.type != "cpu":
        x = resized(_as_float(tiles), size_px)
        return x if statistics is None else normalise(x, *statistics)
    shift, scale = _statistics(*map(tuple, statistics or ((0.0,) * 3, (1.0,) * 3)), tiles.device)
    # By rows of the picture: an op whose innermost side is three channels long is not vectorised.
    shift_row, scale_row = (x.flatten().repeat(size_px) for x in (shift, scale / 255))
    view = _room((len(tiles), size_px, size_px * 3), tiles.device)
    chunk = max(1, CPU_PIXELS // size_px**2)
    for few, out in zip(tiles.split(chunk), view.split(chunk), strict=True):
        pixels = resized(few.contiguous(memory_format=torch.channels_last), size_px)
        torch.addcmul(shift_row, pixels.permute(0, 2, 3, 1).reshape(out.shape).float(), scale_row, out=out)
    return view.view(len(tiles), size_px, size_px, 3).permute(0, 3, 1, 2)


def resized(x: Tensor, size_px: int) -> Tensor:
    """(B, 3, H, H) -> (B, 3, h, h), antialiased, in the type that it has: bytes as Pillow does it, on the CPU only."""
    if x.shape[-1] == size_px:
        return x
    return torch.nn.functional.interpolate(x, (size_px, size_px), mode="bilinear", antialias=True, align_corners=False)


@dataclass(frozen=True)
class Plan:
    """All random choices for one view of B tiles, worked out before any pixel is touched."""

    view: ViewSpec
    where: geometry.Placement
    stain: Floats  # (B, 2, 3) scale and shift of each stain; 0 where it stays as it is
    colour: Floats  # (B, 2, 3, 3)
    blur_sigma: Floats  # (B,), 0: none
    solarize: np.ndarray[tuple[int], np.dtype[np.bool_]]
    jpeg_quality: np.ndarray[tuple[int], np.dtype[np.int64]]  # 0: none

    def of(self, rows: slice) -> Plan:
        rest = (getattr(self, name)[rows] for name in ("stain", "colour", "blur_sigma", "solarize", "jpeg_quality"))
        return Plan(self.view, self.where.of(rows), *rest)


def planned(view: ViewSpec, draws: Draws, tile_px: int) -> Plan:
    where = geometry.Placement(
        *geometry.random_boxes(draws, tile_px, view.scale, view.ratio),
        mirror=draws.happens("mirror", view.mirror_p),
        flip=draws.happens("flip", view.flip_p),
        turns=draws.whole("turns", 4) if view.quarter_turns else np.zeros(draws.count, dtype=np.int64),
        angle=draws.one("rotation", -1, 1) * math.radians(view.rotation_deg),
    )
    stained = draws.happens("stain", view.stain_p)[:, None]
    stain = np.stack(
        [draws.normal("stain scale", 3) * view.stain_scale * stained]
        + [draws.normal("stain shift", 3) * view.stain_shift * stained],
        axis=1,
    )
    jittered = draws.happens("jitter", view.jitter_p)

    def factor(name: str) -> Floats:
        reach = getattr(view, name)
        return np.where(jittered, draws.one(name, max(0.0, 1 - reach), 1 + reach), 1.0)

    jitter = colour.jitter_matrices(
        factor("brightness"),
        factor("contrast"),
        factor("saturation"),
        hue=np.where(jittered, draws.one("hue", -view.hue, view.hue), 0.0),
    )
    low, high = view.jpeg_quality
    return Plan(
        view,
        where,
        stain,
        colour.greyscale(jitter, np.flatnonzero(draws.happens("grey", view.grey_p))),
        np.where(draws.happens("blur", view.blur_p), draws.one("blur sigma", *view.blur_sigma), 0.0),
        draws.happens("solarize", view.solarize_p),
        np.where(draws.happens("jpeg", view.jpeg_p), low + draws.whole("jpeg quality", high - low + 1), 0),
    )


def _make(tiles: Tensor, pixels: Tensor, plan: Plan, out: Tensor) -> None:
    """One view of each tile, into `out`: tiles (B, 3, H, H) uint8, and the same as float `pixels`."""
    view, device = plan.view, tiles.device
    if (again := np.flatnonzero(plan.jpeg_quality)).size:
        part = geometry.on(device, again)
        pixels = pixels.index_copy(0, part, _as_float(jpeg.recompressed(tiles[part], plan.jpeg_quality[again])))
    x = geometry.resampled(pixels, plan.where, view.size_px, view.interpolation)
    if view.interpolation == "bicubic":
        x.clamp_(0, 1)  # it overshoots at edges
    if view.stain_p:  # for those that it leaves alone the identity: picking out the others costs as much
        A, b = colour.stain_matrices(plan.stain[:, 0], plan.stain[:, 1])
        x = colour.restained(x, geometry.on(device, A.astype(np.float32)), geometry.on(device, b.astype(np.float32)))
    colour.recoloured(x, geometry.on(device, plan.colour.astype(np.float32)), out)
    if plan.blur_sigma.any():
        geometry.blur(out, plan.blur_sigma).clamp_(0, 1)  # rounding
    if (bright := np.flatnonzero(plan.solarize)).size:
        part = geometry.on(device, bright)
        out[part] = colour.solarized(out[part], view.solarize_threshold)


def _as_float(tiles: Tensor) -> Tensor:
    """(B, 3, H, W) float in [0, 1], channel by channel in memory, whatever the memory of the tiles."""
    return tiles.contiguous().float().div_(255)
