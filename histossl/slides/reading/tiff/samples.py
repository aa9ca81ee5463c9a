"""What the stored samples of a TIFF mean: one answer for every level, tile and reader of a slide, as RGB of 8 bits.

Colours are decided by the codestream of each tile (`codestream.py`). The range of samples of more than
8 bits is decided once for the slide: tiles that were each stretched by their own range could not be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histossl.core.errors import SlideError
from histossl.slides.reading.tiff.codestream import (
    CMYK,
    RGB,
    YCBCR,
    Codestream,
    colours_by_pixels,
    read_jpeg,
    read_jpeg_2000,
)
from histossl.slides.reading.tiff.ome import ome_pixels
from histossl.slides.reading.tiff.segments import (
    check_place,
    has_plain_rows,
    misplaced,
    read_plain_rows,
    refused_by_libtiff,
    segment_rows,
    segment_size,
)

JPEGS, JPEGS_2000 = (6, 7), (33003, 33004, 33005, 34712)
APERIO_YCC, APERIO_RGB = 33003, 33005  # what OpenSlide takes them for, and Aperio writes in them
VERBATIM = (1, 5, 8, 32773, 32946, 34887, 34925, 50000)  # decoders of these give the components as they are stored
BITS, PHOTOMETRIC = 258, 262  # tags
COLOURS = ("RGB", "YCBCR", "MINISBLACK", "MINISWHITE", "PALETTE")
NAMES = {RGB: "RGB", YCBCR: "YCbCr"}
FULL_RANGE_YCC = (0, 1, 255, 1, 128, 1, 255, 1, 128, 1, 255, 1)

HEADS, ASKED = 8, 4  # tiles whose header is read, and whose pixels are asked if that leaves doubt; of level 0
DEPTHS = range(8, 16)  # bits that samples may hold, besides all that there are
RANGE_SEGMENTS, RANGE_ROWS, RANGE_BYTES = 48, 64, 64 << 20  # spread over a level, that tell the range of its samples
BRIGHTEST = 0.999  # of all samples: the rest may be broken pixels of a camera
OVERSHOOT = 1.03  # of the range: lossy compression does that
STRAY = 0.01  # share of a tile's samples beyond it: with more, the range is wrong

Pixels = NDArray[np.uint8]
Arrays = Sequence[NDArray[Any]]
ReadBytes = Callable[[Any, int], bytes | None]  # of one tile or strip of a page; None if the file leaves it out


class UnknownColours(SlideError):
    """Colours that nobody here can vouch for; another library may show some, which would not make them right."""


def check_samples(path: Path, page: Any) -> None:
    """SlideError if a page's samples are no brightfield colours."""
    bits, photometric = page.bitspersample, str(getattr(page.photometric, "name", page.photometric))
    _check_tags(path, page, photometric)
    if not isinstance(bits, int):
        raise UnknownColours(f"{path.name}: {'/'.join(map(str, bits))} bits per sample; convert it to 8 bits")
    if page.dtype is None or page.dtype.kind not in "bui" or bits > 16 or page.dtype == np.int8:
        raise UnknownColours(f"{path.name}: {page.dtype} pixels; histossl reads 8 or 16 bit brightfield images")
    if photometric not in COLOURS:
        raise UnknownColours(f"{path.name}: {photometric} colour; convert it to RGB")
    if int(page.compression) in VERBATIM and photometric == "YCBCR":
        if getattr(page, "subsampling", None) not in (None, (1, 1)):
            raise SlideError(f"{path.name}: YCbCr with thinned-out colours and no JPEG; convert it to RGB")
        if 532 in page.tags and tuple(page.tags[532].value) != FULL_RANGE_YCC:
            raise UnknownColours(f"{path.name}: YCbCr with a ReferenceBlackWhite of its own; convert it to RGB")
    elif photometric == "YCBCR" and int(page.compression) not in JPEGS:
        page.subsampling = (1, 1)  # what the decoders of JPEG 2000, WebP and the like give, whatever the tag says


def _check_tags(path: Path, page: Any, photometric: str) -> None:
    """Without these tags a file has their defaults, which are hardly ever meant: grey, or 1 bit."""
    told = np.size(page.tags.valueof(BITS)) if BITS in page.tags else 0
    if PHOTOMETRIC not in page.tags:
        raise UnknownColours(f"{path.name}: does not say whether it is RGB (no PhotometricInterpretation); convert it")
    if told not in (1, int(page.samplesperpixel)) and (told or photometric in (RGB, YCBCR)):
        raise UnknownColours(
            f"{path.name}: its tags contradict each other: {photometric} colour, {page.samplesperpixel} samples per "
            f"pixel, and the bits of {told} of them; convert it"
        )


def tag_colours(page: Any) -> str:
    """What a page's tags say of its components; Aperio says it by the number of the compression."""
    if int(page.compression) == APERIO_YCC and (page.description or "").startswith("Aperio"):
        return YCBCR
    return str(getattr(page.photometric, "name", page.photometric))


def colours_of(page: Any, stream: Codestream, by_pixels: Callable[[Any], str]) -> str:
    tag = tag_colours(page)
    return stream.colours(tag, by_pixels(page) if stream.in_doubt(tag) else "")


@dataclass(frozen=True)
class Range:
    """Samples lie between 0 (black) and `white`, those of transparency between 0 and `opaque`."""

    white: int
    opaque: int
    note: str = ""  # where it is not what the file's tags say


class Samples:
    """Decodes the tiles and strips of a TIFF's levels, each a list of pages, and makes RGB of them.

    Nothing is read before it is needed, but the range of samples of more than 8 bits.
    """

    def __init__(self, path: Path, levels: Sequence[Sequence[Any]], ome_xml: str, read: ReadBytes) -> None:
        self._path, self._levels, self._read = path, levels, read
        self._heads: dict[int, list[tuple[int, Codestream]]] = {}
        self._by_pixels: dict[int, str] = {}
        self._finest = levels[0][0]
        self.range = self._find_range(ome_xml) if int(self._finest.bitspersample) > 8 else Range(255, 255)

    # ---- decoding

    def decode(self, page: Any, index: int, data: bytes) -> NDArray[Any] | None:
        """(h, w, samples) of one segment, None if it holds nothing.

        Components are as the page's tags say, except that JPEG and JPEG 2000 in three components come as RGB.
        """
        check_place(page, index)
        page = page.keyframe  # the facts of which a further page of the same layout has no copy
        compression = int(page.compression)
        if compression in JPEGS:
            return self._decode_jpeg(page, index, data)
        segment, _, shape = page.decode(data, index)
        if segment is None:
            return None
        array: NDArray[Any] = np.asarray(segment).reshape(segment.shape[-3:])[: shape[-3], : shape[-2]]
        stream = read_jpeg_2000(data) if compression in JPEGS_2000 and array.shape[2] == 3 else None
        # Of subsampled components the decoder makes RGB by itself.
        if stream is None or stream.subsampled or colours_of(page, stream, self.by_pixels) != YCBCR:
            return array
        return _rgb_from_ycc(self._in_8_bits(page, array, self.range.white))

    def _decode_jpeg(self, page: Any, index: int, data: bytes) -> NDArray[Any]:
        stream = read_jpeg(getattr(page, "jpegheader", None) or data)
        if stream is None:
            raise SlideError(f"{self._path.name}: a JPEG tile without a header of its own")
        self._check_components(page, [stream])
        if stream.components == 3:
            array = _jpeg_pixels(page, data, colours_of(page, stream, self.by_pixels), RGB)
        else:
            array = _jpeg_pixels(page, data)
        (width, height), rows = segment_size(page), segment_rows(page, index)
        across = -(-int(page.imagewidth) // width)
        down = -(-int(page.imagelength) // height)
        row, column = divmod(index % (across * down), across)
        # At the right and lower edge some programs cut tiles to the image.
        least = (min(rows, int(page.imagelength) - row * height), min(width, int(page.imagewidth) - column * width))
        if array.shape[0] < least[0] or array.shape[1] < least[1]:
            raise SlideError(f"{self._path.name}: a JPEG tile of {array.shape[1]} x {array.shape[0]} px")
        return array[:rows, :width]

    def _check_components(self, page: Any, streams: Sequence[Codestream]) -> None:
        if streams and all(each.components == 4 > int(page.samplesperpixel) or each.said == CMYK for each in streams):
            raise UnknownColours(f"{self._path.name}: JPEG tiles in CMYK; convert it to RGB")

    def as_rgb(self, page: Any, pixels: NDArray[Any]) -> Pixels:
        """(h, w, 3) of what `decode` gives: grey, inverted, palette, YCbCr, what is transparent over white."""
        photometric = page.photometric.name
        if photometric == "PALETTE":
            table = np.asarray(page.colormap)  # (3, 2**bits); of 16 bits, but some programs fill in 8
            table = (table >> 8 if table.max() > 255 else table).astype(np.uint8)
            return np.ascontiguousarray(table[:, pixels[..., 0].astype(np.intp)].transpose(1, 2, 0))
        count = pixels.shape[2] - (pixels.shape[2] in (2, 4))
        colour = self._in_8_bits(page, pixels[..., :count], self.range.white)
        if photometric == "MINISWHITE":
            colour = 255 - colour
        if photometric == "YCBCR" and (int(page.compression) in VERBATIM or int(page.planarconfig) == 2):
            colour = _rgb_from_ycc(colour)
        if count < pixels.shape[2]:
            alpha = self._in_8_bits(page, pixels[..., count:], self.range.opaque)
            colour = over_white(colour, alpha, multiplied=1 in page.extrasamples)
        return np.ascontiguousarray(np.repeat(colour, 3, axis=2) if count == 1 else colour)

    def _in_8_bits(self, page: Any, pixels: NDArray[Any], white: int) -> Pixels:
        if int(self._finest.bitspersample) <= 8:  # a level that is deeper than the slide has its own range
            white = int(np.iinfo(pixels.dtype).max) if pixels.dtype.itemsize > 1 else white
        if pixels.dtype == np.uint8:
            bits = int(page.bitspersample) if int(page.compression) in VERBATIM else 8
            return pixels if bits >= 8 else in_range(pixels, 2**bits - 1)
        if pixels.dtype == np.bool_:
            return pixels.astype(np.uint8) * 255
        if pixels.size and pixels.dtype.kind == "i" and pixels.min() < 0:
            raise SlideError(f"{self._path.name}: samples below 0; histossl reads 8 or 16 bit brightfield images")
        if pixels.size and pixels.max() > white * OVERSHOOT and np.mean(pixels > white * OVERSHOOT) > STRAY:
            raise SlideError(f"{self._path.name}: samples of up to {pixels.max()}, where {white} is white")
        return in_range(pixels, white)

    # ---- colours

    def by_pixels(self, page: Any) -> str:
        """What a level's pixels say of its components where headers leave doubt; else what those of level 0 say."""
        key = int(page.offset)
        if key not in self._by_pixels:
            tag = tag_colours(page)
            doubtful = [index for index, stream in self._streams(page) if stream.in_doubt(tag)]
            found = [pixels for index in _spread(doubtful, ASKED) for pixels in self._stored(page, index)]
            self._by_pixels[key] = colours_by_pixels(np.concatenate(found)) if found else ""
        return self._by_pixels[key] or (self.by_pixels(self._finest) if page is not self._finest else "")

    def _streams(self, page: Any) -> list[tuple[int, Codestream]]:
        """Some tiles of a page, by number, and what their headers say."""
        key, compression = int(page.offset), int(page.compression)
        if key not in self._heads:
            read_head = read_jpeg if compression in JPEGS else read_jpeg_2000
            coded = compression in (*JPEGS, *JPEGS_2000) and int(page.planarconfig) == 1
            chosen = _spread(_stored_segments(page), HEADS if page is self._finest else ASKED) if coded else []
            header = getattr(page, "jpegheader", None)
            self._heads[key] = []
            for index in chosen:
                with suppress(SlideError):  # a damaged tile says nothing of the others
                    stream = read_head(header or self._read(page, index) or b"")
                    self._heads[key] += [(index, stream)] if stream is not None else []
        return self._heads[key]

    def _stored(self, page: Any, index: int) -> Iterator[Pixels]:
        """(n, 3): pixels of a tile as they are stored, in 8 bits; nothing of a damaged one."""
        with suppress(Exception):
            data = self._read(page, index) or b""
            jpeg = int(page.compression) in JPEGS
            array = _jpeg_pixels(page, data, RGB, RGB) if jpeg else np.asarray(imagecodecs.jpeg2k_decode(data))
            yield self._in_8_bits(page, array[::2, ::2, :3], self.range.white).reshape(-1, 3)

    def notes(self) -> list[str]:
        """What a person should know of how the samples are read. UnknownColours if they cannot be."""
        notes = {self.range.note} if self.range.note else set()
        for page in (pages[0] for pages in self._levels):
            tag = tag_colours(page)
            self._check_components(page, [stream for _, stream in self._streams(page)])
            short = sum(map(bool, misplaced(page)))
            if short:
                notes.add(f"damaged: {short} of {len(page.dataoffsets)} tiles or strips are too short or lie nowhere")
            missing = 0 if page.is_tiled else sum(count == 0 for count in page.databytecounts)
            if missing:  # tiles of glass are often left out, strips are not
                notes.add(f"{missing} of {len(page.dataoffsets)} strips hold nothing and are white")
            for _, stream in self._streams(page) if tag in NAMES else ():
                found = colours_of(page, stream, self.by_pixels)
                if stream.in_doubt(tag) and not self.by_pixels(page):
                    notes.add(f"nothing tells for sure whether its tiles hold RGB or YCbCr: read as {NAMES[found]}")
                elif stream.components == 3 and found != tag:
                    notes.add(f"its tiles hold {NAMES[found]}, its tags say {NAMES[tag]}: read as {NAMES[found]}")
        return sorted(notes)

    def openslide_differs(self) -> bool:
        """Whether OpenSlide, which trusts the tags and shows the upper 8 of 16 bits, would show others, or none."""
        for page in (pages[0] for pages in self._levels):
            compression = int(page.compression)
            trusted = {APERIO_YCC: YCBCR, APERIO_RGB: RGB}.get(compression) or tag_colours(page)
            if int(page.bitspersample) != 8 or refused_by_libtiff(page) or any(misplaced(page)):
                return True
            for _, stream in self._streams(page):
                unlike = stream.boxed or stream.components != int(page.samplesperpixel)
                if unlike or (stream.components == 3 and colours_of(page, stream, self.by_pixels) != trusted):
                    return True
        return False

    # ---- range

    def _find_range(self, ome_xml: str) -> Range:
        page = self._finest
        stored = int(page.bitspersample)
        most = stored - (page.dtype.kind == "i")
        said = [*_stated_bits(page, ome_xml), *((stream.bits, "codestream") for _, stream in self._streams(page)[:1])]
        return find_range(stored, most, said, *self._sampled())

    def _sampled(self) -> tuple[Arrays, Arrays]:
        """Samples of colour and of transparency over the finest and the coarsest level."""
        colours: list[NDArray[Any]] = []
        alphas: list[NDArray[Any]] = []
        for pages in {id(pages): pages for pages in (self._levels[-1], self._levels[0])}.values():
            for pixels, is_alpha in self._some(pages):
                count = pixels.shape[2] - (pixels.shape[2] in (2, 4))
                (alphas if is_alpha else colours).append(pixels[..., :count].ravel()[::3])
                if count < pixels.shape[2]:
                    alphas.append(pixels[..., count:].ravel())
        return colours, alphas

    def _some(self, pages: Sequence[Any]) -> Iterator[tuple[NDArray[Any], bool]]:
        """Stored samples spread over a level; and whether they are transparency in a plane of its own."""
        taken = 0
        for page in pages:
            facts = page.keyframe
            planes = int(facts.samplesperpixel) if int(facts.planarconfig) == 2 else 1
            plain = has_plain_rows(facts) and page is facts
            pieces = range(int(facts.imagelength)) if plain else _stored_segments(page)
            for piece in _spread(pieces, RANGE_ROWS if plain else RANGE_SEGMENTS):
                alone = planes in (2, 4) and piece * planes // len(page.dataoffsets) == planes - 1
                with suppress(Exception):  # what is damaged is told where it is wanted
                    pixels = self._raw_row(page, piece) if plain else self._raw(page, piece)
                    if pixels is not None and taken < RANGE_BYTES:
                        taken += pixels.nbytes
                        yield pixels, alone

    def _raw_row(self, page: Any, row: int) -> NDArray[Any] | None:
        return read_plain_rows(page, 0, row, int(page.imagewidth), row + 1)

    def _raw(self, page: Any, index: int) -> NDArray[Any] | None:
        data = self._read(page, index)
        pixels = None if data is None else page.decode(data, index, **_jpeg_parts(page))[0]
        return None if pixels is None else np.asarray(pixels).reshape(pixels.shape[-3:])


def find_range(stored: int, most: int, said: Iterable[tuple[int, str]], colours: Arrays, alphas: Arrays = ()) -> Range:
    """Of samples stored in so many bits, of which `most` can be used: what is said of them, else what they are."""
    colour, alpha = (
        int(np.quantile(np.hstack(each), BRIGHTEST, method="lower")) if each else 0 for each in (colours, alphas)
    )
    bits, source = next(((bits, source) for bits, source in said if 8 <= bits < most), (0, ""))
    if stored == 16 and colour and (not bits or colour > (2**bits - 1) * OVERSHOOT):
        bits = _depth(colour, most)
        source = "brightest pixels"
    white = 2 ** (bits or most) - 1
    note = f"{stored}-bit samples hold {bits} bits by their {source}: {white} is white" if 0 < bits < most else ""
    return Range(white, 2 ** _depth(alpha, most) - 1 if alpha else white, note)


def _depth(brightest: int, most: int) -> int:
    return next((each for each in DEPTHS if each < most and brightest <= (2**each - 1) * OVERSHOOT), most)


def _stated_bits(page: Any, ome_xml: str) -> Iterator[tuple[int, str]]:
    """Bits that a file's metadata say its samples hold, 0 if they say nothing; and where."""
    pixels = ome_pixels(ome_xml, int(page.imagewidth), int(page.imagelength), int(page.treeindex[0]))
    bits = [each.get("SignificantBits", "") for each in pixels]
    yield max((int(each) for each in bits if each.isdecimal()), default=0), "OME SignificantBits"
    for code, name in ((281, "MaxSampleValue"), (341, "SMaxSampleValue")):
        value = float(np.max(page.tags[code].value)) if code in page.tags else 0
        yield next((each for each in DEPTHS if 0 < value < 2**each), 0), name


def _stored_segments(page: Any) -> Sequence[int]:
    return [index for index, count in enumerate(page.databytecounts) if count]


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, evenly spread."""
    if not len(numbers):
        return []
    places = np.unique(np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(int))
    return [int(numbers[place]) for place in places]


def _jpeg_parts(page: Any) -> dict[str, Any]:
    return {"jpegtables": getattr(page, "jpegtables", None), "jpegheader": getattr(page, "jpegheader", None)}


def _jpeg_pixels(page: Any, data: bytes, space: str | None = None, out: str | None = None) -> NDArray[Any]:
    """(h, w, components) of a JPEG tile whose components are `space`, as `out`."""
    tables, header = _jpeg_parts(page).values()
    pixels = imagecodecs.jpeg_decode(data, tables=tables, header=header, colorspace=space, outcolorspace=out)
    return np.asarray(pixels).reshape(*pixels.shape[:2], -1)


def over_white(colour: Pixels, alpha: Pixels, multiplied: bool = False) -> Pixels:
    """(h, w, c) of colours under alpha (h, w, 1) on white; `multiplied` by it already or not."""
    weight = np.uint16(255) if multiplied else alpha.astype(np.uint16)
    mixed = (colour * weight + np.uint16(255) * (np.uint16(255) - alpha) + 127) // 255
    found: Pixels = np.minimum(mixed, 255).astype(np.uint8)
    return found


def in_range(pixels: NDArray[Any], white: int) -> Pixels:
    """0 to `white` as 0 to 255, rounded; what is beyond is white."""
    table = ((np.arange(white + 1, dtype=np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    found: Pixels = table[np.minimum(pixels, white)]
    return found


def _rgb_from_ycc(pixels: Pixels) -> Pixels:
    image = Image.frombytes("YCbCr", pixels.shape[1::-1], np.ascontiguousarray(pixels).tobytes())
    return np.asarray(image.convert("RGB"))
