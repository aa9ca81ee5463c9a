"""Open any slide and read any part of it at any physical scale, whatever its format.

OpenSlide reads what it knows, tifffile what OpenSlide refuses (OME-TIFF, plain or JPEG 2000 or deflate TIFF),
Pillow plain PNG and JPEG regions. All three answer in the same frame: level-0 pixels, white outside the slide.
Label and macro images are never opened: they carry names.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from histossl.core.errors import SlideError
from histossl.core.units import l0_from_px, l0_from_um
from histossl.slides.archive import NOT_REGULAR
from histossl.slides.reading.dicom import check_frame_colours
from histossl.slides.reading.levels import believe
from histossl.slides.reading.mpp import Scale, missing
from histossl.slides.reading.openslide_backend import MISREAD, OpenSlideLevels
from histossl.slides.reading.pillow_backend import PlainLevels
from histossl.slides.reading.tiff.directories import directory_damage
from histossl.slides.reading.tiff.samples import UnknownColours
from histossl.slides.reading.tifffile_backend import NativeLevel, TiffLevels, blaming

MAX_READ_PX = 16 << 20  # larger reads are cut in two, so that memory stays flat
NOT_TURNED = "{} Orientation tag {} is not applied: pixels are read as stored"
GRID = 1 / 64  # a shift below this many pixels is not worth a resampling

FORMATS = {
    "aperio": "Aperio SVS",
    "dicom": "DICOM",
    "generic-tiff": "TIFF",
    "hamamatsu": "Hamamatsu NDPI/VMS",
    "leica": "Leica SCN",
    "mirax": "MIRAX MRXS",
    "philips": "Philips TIFF",
    "sakura": "Sakura",
    "trestle": "Trestle TIFF",
    "ventana": "Ventana BIF",
    "zeiss": "Zeiss CZI",
}
# Their OpenSlide levels are TIFF pages, tile for tile. Leica's lie somewhere on a larger plane, Ventana's overlap.
NATIVE_VENDORS = ("aperio", "generic-tiff", "philips", "trestle")
LEICA = "leica"
TAG_TRUSTING = (*NATIVE_VENDORS, LEICA, "ventana")  # where OpenSlide takes a TIFF's tags for the colours
SAME_LEVEL = 1e-3  # two downsamples of one level differ by less


class Levels(Protocol):
    """A pyramid of pixels: the one thing that differs between the libraries."""

    sizes: tuple[tuple[int, int], ...]
    in_strips: bool  # stored as full rows, so that a wide low box is read at the price of a narrow one

    def downsamples(self) -> tuple[float, ...]: ...
    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]: ...
    def scale(self) -> Scale | None: ...
    def close(self) -> None: ...


class Slide:
    """Pixels with a physical scale. `mpp_l0` is NaN only if opened with `need_mpp=False` and the scale is unknown."""

    def __init__(self, path: Path, levels: Levels, format: str, vendor: str) -> None:
        self.path, self._levels, self.format, self.vendor = path, levels, format, vendor
        self.level_sizes = levels.sizes
        self.level_downsamples = levels.downsamples()
        self.size_l0 = levels.sizes[0]
        self.bounds_l0 = _bounds_l0(getattr(levels, "properties", {}))
        self.mpp_l0 = math.nan
        self.mpp_source = ""
        self.mpp_problem = ""  # why mpp_l0 is not known
        self.warnings: list[str] = []  # what a person should know, though the slide can be used
        self.compression = ""
        self.native_tile: tuple[int, int] | None = None
        self.beat: Callable[[], None] = lambda: None  # called between the pieces of a large read: a sign of life

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._levels.close()

    # ---- pixels

    def read_region_l0(
        self,
        x_l0: float,
        y_l0: float,
        width_l0: float,
        height_l0: float,
        out_width_px: int,
        out_height_px: int,
        level: int | None = None,
    ) -> NDArray[np.uint8]:
        """The box as (out_height_px, out_width_px, 3), antialiased from the nearest finer level, white outside.

        `level` asks another level, where that one is damaged.
        """
        assert min(width_l0, height_l0) > 0, (width_l0, height_l0)
        assert min(out_width_px, out_height_px) >= 1, (out_width_px, out_height_px)
        if level is None:
            level = self.level_for(min(width_l0 / out_width_px, height_l0 / out_height_px))
        downsample = self.level_downsamples[level]
        box = (x_l0 / downsample, y_l0 / downsample, width_l0 / downsample, height_l0 / downsample)
        out = np.empty((out_height_px, out_width_px, 3), dtype=np.uint8)
        self._read(level, *box, out)
        return out

    def read_region_um(
        self, x_um: float, y_um: float, width_um: float, height_um: float, mpp: float
    ) -> NDArray[np.uint8]:
        """A box in microns from the slide's upper left corner, as (height, width, 3) RGB, white outside the slide.

        A pixel is exactly `mpp` microns wide; the sides are rounded to whole pixels (width_um / mpp of them).
        ValueError for a box or scale that is not positive, SlideError where the slide's own scale is not known.
        """
        named = {"width_um": width_um, "height_um": height_um, "mpp": mpp}
        for name, value in named.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{self.path.name}: {name} {value}: must be a length in microns above 0")
        if math.isnan(self.mpp_l0):
            raise SlideError(f"{self.path.name}: {self.mpp_problem}")
        width_px, height_px = max(1, round(width_um / mpp)), max(1, round(height_um / mpp))
        x_l0, y_l0 = l0_from_um(x_um, self.mpp_l0), l0_from_um(y_um, self.mpp_l0)
        width_l0, height_l0 = l0_from_px(width_px, mpp, self.mpp_l0), l0_from_px(height_px, mpp, self.mpp_l0)
        return self.read_region_l0(x_l0, y_l0, width_l0, height_l0, width_px, height_px)

    def thumbnail(self, max_side_px: int) -> NDArray[np.uint8]:
        """The whole slide, its longer side max_side_px (or less, if the slide is smaller)."""
        width_l0, height_l0 = self.size_l0
        shrink = min(1.0, max_side_px / max(width_l0, height_l0))
        return self.read_region_l0(
            0, 0, width_l0, height_l0, max(1, round(width_l0 * shrink)), max(1, round(height_l0 * shrink))
        )

    def level_for(self, downsample: float) -> int:
        """The coarsest level that is not coarser than wanted."""
        fine = [level for level, one in enumerate(self.level_downsamples) if one <= downsample * 1.001]
        return max(fine, key=lambda level: self.level_downsamples[level]) if fine else 0

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """(height, width, 3) pixels of one level as stored, in its own pixels; white outside."""
        return self._levels.read_level(level, x, y, width, height)

    def read_bgrx(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8] | None:
        """Like read_level, but (height, width, 4) as OpenSlide paints it: blue, green, red, and a byte without meaning.

        For bulk reading: the copies on the way to RGB cost as much as a tile's decoding. None where OpenSlide does not
        read the level; then read_level does.
        """
        return self._levels.read_bgrx(level, x, y, width, height) if isinstance(self._levels, OpenSlideLevels) else None

    def _read(self, level: int, x: float, y: float, width: float, height: float, out: NDArray[np.uint8]) -> None:
        """Fill `out` with a box of a level, both in the level's pixels; a box too large is halved first."""
        out_height, out_width = out.shape[:2]
        if width * height > MAX_READ_PX and max(out_height, out_width) > 1:
            if out_height >= out_width or (self._levels.in_strips and out_height > 1):
                half = out_height // 2
                part = height * half / out_height
                self._read(level, x, y, width, part, out[:half])
                self._read(level, x, y + part, width, height - part, out[half:])
            else:
                half = out_width // 2
                part = width * half / out_width
                self._read(level, x, y, part, height, out[:, :half])
                self._read(level, x + part, y, width - part, height, out[:, half:])
            return
        self.beat()
        left, top = round(x), round(y)
        if (
            abs(width - out_width) < GRID
            and abs(height - out_height) < GRID
            and abs(x - left) < GRID
            and abs(y - top) < GRID
        ):
            out[:] = self._levels.read_level(level, left, top, out_width, out_height)
            return
        # Shrinking, Hamming averages like a box without its jagged edges; enlarging, bicubic. Pillow widens the filter
        # by the shrink factor (that is the antialiasing), so it needs that many pixels around the box.
        shrink = max(width / out_width, height / out_height)
        method = Image.Resampling.HAMMING if shrink > 1 else Image.Resampling.BICUBIC
        margin = math.ceil(2 * max(shrink, 1.0)) + 1
        left, top = math.floor(x) - margin, math.floor(y) - margin
        right, bottom = math.ceil(x + width) + margin, math.ceil(y + height) + margin
        pixels = self._levels.read_level(level, left, top, right - left, bottom - top)
        within = (x - left, y - top, x - left + width, y - top + height)
        out[:] = np.asarray(Image.fromarray(pixels).resize((out_width, out_height), method, box=within))

    # ---- the file's own tiles

    @cached_property
    def native(self) -> tuple[NativeLevel | None, ...] | None:
        """Per level of `level_sizes` how the file stores its tiles, for copying them; None if it is no such file."""
        if isinstance(self._levels, TiffLevels):
            found = self._levels.native
            return found if any(found) else None
        tiff = getattr(self._levels, "tiff", None)
        if tiff is None:
            return None
        found = tuple(
            self._native_of(number, [one for one in tiff.native if one is not None])
            for number in range(len(self.level_sizes))
        )
        return found if any(found) else None

    def _native_of(self, number: int, pages: list[NativeLevel]) -> NativeLevel | None:
        """The TIFF page that is this level."""
        size, downsample = self.level_sizes[number], self.level_downsamples[number]
        if self.vendor == LEICA:
            corner = (int(self.bounds_l0[0] / downsample), int(self.bounds_l0[1] / downsample))  # as OpenSlide rounds
            same = [one for one in pages if math.isclose(one.downsample, downsample, rel_tol=SAME_LEVEL)]
        else:
            corner, same = (0, 0), [one for one in pages if (one.width_px, one.height_px) == size]
        return replace(same[-1], downsample=downsample, corner_px=corner) if same else None


# ---- opening


def open_slide(
    path: Path | str, slide_mpp: float | None = None, *, mpp_source: str = "--slide-mpp", need_mpp: bool = True
) -> Slide:
    """A Slide, or a SlideError that says why not. `slide_mpp` goes before what the file says.

    With need_mpp=False a slide of unknown scale opens too, its `mpp_problem` saying what is missing (for `scan`).
    """
    path = Path(path)
    _refuse_hollow(path)
    with blaming(path, "opening it"):
        slide = _opened(path)
    try:
        if slide_mpp is not None:
            slide.mpp_l0, slide.mpp_source = slide_mpp, mpp_source
            own = slide._levels.scale()
            contradiction = own.contradiction(slide_mpp, mpp_source) if own else ""
            slide.warnings += [contradiction] if contradiction else []
        else:
            _believe(slide, slide._levels.scale())
        if slide.mpp_problem and need_mpp:
            raise SlideError(f"{path.name}: {slide.mpp_problem}")
    except BaseException:
        slide.close()
        raise
    return slide


def _believe(slide: Slide, scale: Scale | None) -> None:
    if scale is None:
        slide.mpp_problem = missing(_objective(slide) or _dpi(slide))
        return
    slide.mpp_source = scale.source
    slide.mpp_problem = scale.problem()
    if not slide.mpp_problem:
        slide.mpp_l0 = scale.mpp
        slide.warnings += [scale.warning()] if scale.warning() else []


def _bounds_l0(properties: Mapping[str, str]) -> tuple[int, int]:
    """The corner of what was scanned of a larger plane (MIRAX, Leica). QuPath crops to it: its coordinates begin there.

    As QuPath does only if all four are told.
    """
    try:
        x, y, _, _ = (int(properties[f"openslide.bounds-{name}"]) for name in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return 0, 0
    return x, y


def _one_area(properties: Mapping[str, str], size: tuple[int, int]) -> bool:
    """Whether all that was scanned of a larger plane is this one image."""
    return tuple(properties.get(f"openslide.bounds-{side}") for side in ("width", "height")) == tuple(map(str, size))


def _objective(slide: Slide) -> str:
    properties = getattr(slide._levels, "properties", {})
    power = properties.get("openslide.objective-power")
    return f" (its header says {power}x)" if power else ""


def _dpi(slide: Slide) -> str:
    dpi = getattr(slide._levels, "dpi", None)
    return "; its dots per inch are not read: they are a screen's or a printer's" if dpi else ""


def _refuse_hollow(path: Path) -> None:
    """The commonest damage, in plain words, before a library says it in its own."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise SlideError(f"{path.name}: {NOT_REGULAR}")  # opening a named pipe waits for ever
        with path.open("rb") as file:
            head = file.read(4096)
    except IsADirectoryError as error:
        raise SlideError(f"{path.name}: a folder, not a slide") from error
    except FileNotFoundError as error:
        raise SlideError(f"{path.name}: no such file (moved, or a link to nothing)") from error
    except PermissionError as error:
        raise SlideError(f"{path.name}: no permission to read it; chmod or chown it") from error
    except OSError as error:
        raise SlideError(f"{path.name}: cannot be read ({error.strerror})") from error
    if status.st_size == 0:
        raise SlideError(f"{path.name}: empty (0 bytes); copy or download it again")
    if not any(head):
        raise SlideError(f"{path.name}: begins with zeros; copy or download it again")
    endless = directory_damage(path)
    if endless:
        raise SlideError(f"{path.name}: {endless}")


def _opened(path: Path) -> Slide:
    try:
        vendor = openslide.OpenSlide.detect_format(str(path))
    except openslide.OpenSlideError as error:
        raise SlideError(f"{path.name}: OpenSlide cannot look at it ({error})") from error
    refusal = ""
    if vendor is not None:
        try:
            return _through_openslide(path, vendor)
        except UnknownColours:
            raise
        except SlideError as error:
            refusal = str(error)
    magic = _magic(path)
    if magic == "tiff":
        try:
            return _through_tifffile(path)
        except UnknownColours:
            raise
        except SlideError as error:
            # For a file that OpenSlide knows, its own words tell more than tifffile's about the same damage.
            raise SlideError(refusal or str(error)) from error
    if magic in ("png", "jpeg"):
        return _plain(path, magic)
    raise SlideError(refusal or f"{path.name}: not a slide or image that OpenSlide, tifffile or Pillow knows")


def _magic(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(8)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if head == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "jpeg" if head[:3] == b"\xff\xd8\xff" else ""


def _through_openslide(path: Path, vendor: str) -> Slide:
    levels = OpenSlideLevels(path, vendor)
    unread = ""
    try:
        tiff = TiffLevels(path) if _magic(path) == "tiff" else None
    except UnknownColours as error:
        if vendor in NATIVE_VENDORS:  # what OpenSlide shows of them is a guess
            levels.close()
            raise
        tiff, unread = None, str(error).removeprefix(f"{path.name}: ")
    except SlideError as error:
        if vendor == "generic-tiff" and error.__cause__ is None:
            levels.close()
            raise  # understood, and no slide: OpenSlide would show one of its images without a word
        tiff, unread = None, str(error).removeprefix(f"{path.name}: ")
    try:
        misread = tiff is not None and vendor in TAG_TRUSTING and tiff.samples.openslide_differs()
        if tiff is not None and _only_for_tifffile(levels, tiff, misread):
            levels.close()
            return _of_tiff(path, tiff, "ome" if tiff.is_ome else "perkinelmer" if tiff.is_qpi else vendor)
        if tiff is not None:
            _refuse_damage(path, tiff)
        believe(levels, tiff.busy_places() if tiff is not None else ())
        slide = Slide(path, levels, FORMATS.get(vendor, vendor), vendor)
        slide.native_tile = levels.tile_size
        if vendor == "dicom":
            doubt = check_frame_colours(path, levels.properties)
            slide.warnings += [doubt] if doubt else []
        if tiff is not None:
            _described(slide, tiff)
            if tiff.is_qpi and vendor == "generic-tiff":
                slide.format, slide.vendor = "QPTIFF", "perkinelmer"
            # Where tiles overlap (Trestle does that) OpenSlide tells no tile size; of Leica's images it never does.
            alone = levels.tile_size is not None or _one_area(levels.properties, tiff.sizes[0])
            if misread and vendor == LEICA:
                raise SlideError(f"{path.name}: {MISREAD}")  # then tifffile reads it, as a plane of its own
            if misread and not (vendor in NATIVE_VENDORS and alone):
                raise UnknownColours(f"{path.name}: {MISREAD}; convert it to RGB")
            if vendor in (*NATIVE_VENDORS, LEICA) and alone:
                if len({*tiff.sizes}) < len(tiff.sizes):  # sizes say which page is which level
                    believe(tiff, tiff.busy_places())
                levels.stand_by(tiff, misread)
            else:
                tiff.close()
        elif unread and vendor == "generic-tiff":
            slide.warnings.append(f"read through OpenSlide alone, since tifffile says: {unread}")
        slide.warnings += [one for one in levels.warnings() if one not in slide.warnings]
        return slide
    except BaseException:
        levels.close()
        if tiff is not None:
            tiff.close()
        raise


def _only_for_tifffile(levels: OpenSlideLevels, tiff: TiffLevels, misread: bool) -> bool:
    """Whether OpenSlide would show other pixels than the slide's, or not all of its levels.

    Of an OME-TIFF it sees the first level alone (the rest lies in sub-directories) and no scale; where a TIFF has an
    Orientation tag it mirrors each tile by itself. Of a plain TIFF it takes the first page for the slide, and pages
    flagged as reduced for its levels, so it misses a slide behind its overview, and levels without a flag.
    """
    if levels.vendor == "generic-tiff":
        return tiff.is_ome or misread or tiff.orientation not in (0, 1) or sorted(levels.sizes) != sorted(tiff.sizes)
    return levels.vendor == "aperio" and levels.sizes[0] != tiff.sizes[0]


def _through_tifffile(path: Path) -> Slide:
    tiff = TiffLevels(path)
    try:
        return _of_tiff(path, tiff, "perkinelmer" if tiff.is_qpi else ("ome" if tiff.is_ome else "plain-tiff"))
    except BaseException:
        tiff.close()
        raise


def _of_tiff(path: Path, tiff: TiffLevels, vendor: str) -> Slide:
    _refuse_damage(path, tiff)
    believe(tiff, tiff.busy_places())
    return _described(Slide(path, tiff, _tiff_format(tiff), vendor), tiff)


def _tiff_format(tiff: TiffLevels) -> str:
    if tiff.is_qpi:
        return "QPTIFF"
    return "OME-TIFF" if tiff.is_ome else ("BigTIFF" if tiff.is_big else "TIFF")


def _described(slide: Slide, tiff: TiffLevels) -> Slide:
    slide.compression = tiff.compression
    slide.native_tile = tiff.tile_size or slide.native_tile
    if tiff.orientation not in (0, 1):
        slide.warnings.append(NOT_TURNED.format("TIFF", tiff.orientation))
    slide.warnings += tiff.warnings()
    doubt = tiff.doubt()
    slide.warnings += [doubt] if doubt else []
    with blaming(slide.path, "reading its first tiles"):
        slide.warnings += tiff.samples.notes()
    return slide


def _refuse_damage(path: Path, tiff: TiffLevels) -> None:
    damage = tiff.damage()
    if damage:
        raise SlideError(f"{path.name}: {damage}")


def _plain(path: Path, kind: str) -> Slide:
    levels = PlainLevels(path)
    slide = Slide(path, levels, kind.upper(), "")
    slide.warnings += levels.notes
    if levels.orientation not in (0, 1):
        slide.warnings.append(NOT_TURNED.format("EXIF", levels.orientation))
    slide.compression = "deflate" if kind == "png" else "JPEG"
    return slide
