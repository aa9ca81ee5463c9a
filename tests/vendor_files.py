"""Tiny slides laid out as each scanner's files are, so that formats are tested of which no free file is at hand.

Each writer takes painted pixels (h, w, 3), both sides a multiple of 256, and their microns per pixel; the file has two
levels, the second at half size. Where a scanner keeps a label or macro image, one full of SECRET grey is put in.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histossl.demo.pyramid import halved

Pixels = NDArray[np.uint8]
SECRET = 77
TILE_PX = 128
QUALITY = 97


def _label() -> Pixels:
    return np.full((64, 96, 3), SECRET, np.uint8)


def _per_cm(mpp: float) -> dict[str, Any]:
    return {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}


def _tiled(**more: Any) -> dict[str, Any]:
    return {
        "tile": (TILE_PX, TILE_PX),
        "photometric": "rgb",
        "compression": "jpeg",
        "compressionargs": {"level": QUALITY},
        "metadata": None,
        **more,
    }


def philips(path: Path, pixels: Pixels, mpp: float) -> None:
    def level(number: int) -> str:
        spacing = mpp * 2**number / 1000
        return (
            '<DataObject ObjectType="PixelDataRepresentation">'
            f'<Attribute Name="DICOM_PIXEL_SPACING">"{spacing:.7f}" "{spacing:.7f}"</Attribute>'
            f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_NUMBER">{number}</Attribute></DataObject>'
        )

    xml = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
        '<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array><DataObject ObjectType="DPScannedImage">'
        '<Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>'
        f'<Attribute Name="DICOM_PIXEL_SPACING">"{mpp / 1000:.7f}" "{mpp / 1000:.7f}"</Attribute>'
        '<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>'
        f"{level(0)}{level(1)}</Array></Attribute></DataObject></Array></Attribute></DataObject>"
    )
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(pixels, **_tiled(description=xml, software="Philips DP v1.0"))
        tiff.write(halved(pixels), **_tiled(subfiletype=1, software=False))
        tiff.write(_label(), photometric="rgb", compression="jpeg", description="Label", metadata=None)


def trestle(path: Path, pixels: Pixels, mpp: float) -> None:
    with tifffile.TiffWriter(path) as tiff:
        for number, level in enumerate((pixels, halved(pixels))):
            # MedScan writes microns per pixel into the tags that are for pixels per inch.
            scale = {"resolution": (mpp * 2**number, mpp * 2**number)}
            told = "Objective Power=20;Background Color=FFFFFF" if not number else None
            tiff.write(level, **_tiled(description=told, software="MedScan", subfiletype=min(number, 1), **scale))


LEICA_GAP_PX = 32


def leica(path: Path, pixels: Pixels, mpp: float, gap_px: int = LEICA_GAP_PX) -> None:
    """The image lies within a larger collection: OpenSlide shows the gap around it as glass."""
    height, width = pixels.shape[:2]
    nm = round(mpp * 1000)
    sizes = [(width, height), (width // 2, height // 2)]
    dimensions = "".join(
        f'<dimension sizeX="{w}" sizeY="{h}" r="{number}" ifd="{number}"/>' for number, (w, h) in enumerate(sizes)
    )
    xml = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" version="2.0">'
        f'<collection name="a" sizeX="{(width + gap_px) * nm}" sizeY="{(height + gap_px) * nm}">'
        f'<image name="main"><pixels sizeX="{width}" sizeY="{height}">{dimensions}</pixels>'
        f'<view sizeX="{width * nm}" sizeY="{height * nm}" offsetX="{gap_px * nm}" '
        f'offsetY="{gap_px * nm}" spacingZ="0"/>'
        "<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings>"
        "<illuminationSettings><numericalAperture>0.4</numericalAperture>"
        "<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings>"
        "</image></collection></scn>"
    )
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(pixels, **_tiled(description=xml, **_per_cm(mpp)))
        tiff.write(halved(pixels), **_tiled(subfiletype=1, **_per_cm(2 * mpp)))


def ventana(path: Path, pixels: Pixels, mpp: float) -> None:
    """Tiles without overlap, numbered from the lower left corner, every other row backwards."""
    columns, rows = pixels.shape[1] // TILE_PX, pixels.shape[0] // TILE_PX

    def number(column: int, row: int) -> int:
        up = rows - 1 - row
        return up * columns + (columns - 1 - column if up % 2 else column) + 1

    joint = (
        '<TileJointInfo FlagJoined="1" Confidence="98" Direction="{}" Tile1="{}" Tile2="{}" OverlapX="0" OverlapY="0"/>'
    )
    joints = "".join(
        joint.format("RIGHT", number(column, row), number(column + 1, row))
        for row in range(rows)
        for column in range(columns - 1)
    ) + "".join(
        joint.format("UP", number(column, row), number(column, row - 1))
        for row in range(1, rows)
        for column in range(columns)
    )
    stitched = (
        f'<EncodeInfo Ver="2"><SlideStitchInfo><ImageInfo AOIScanned="1" AOIIndex="0" Width="{TILE_PX}" '
        f'Height="{TILE_PX}" NumRows="{rows}" NumCols="{columns}" Pos-X="0" Pos-Y="0">{joints}</ImageInfo>'
        '</SlideStitchInfo><AoiOrigin><AOI0 OriginX="0" OriginY="0"/></AoiOrigin></EncodeInfo>'
    )
    scanned = f'<iScan Z-layers="1" Magnification="20" ScanRes="{mpp}" UnitNumber="1"/>'

    def packet(xml: str) -> tuple[int, str, int, bytes, bool]:
        return 700, "B", len(xml), xml.encode(), True

    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(_label(), photometric="rgb", description="Label Image", metadata=None, extratags=[packet(scanned)])
        told = "level=0 mag=20 quality=90"
        tiff.write(pixels, **_tiled(description=told, extratags=[packet(stitched)]))
        tiff.write(halved(pixels), **_tiled(description="level=1 mag=10 quality=90", subfiletype=1))


def qptiff(path: Path, pixels: Pixels, mpp: float) -> None:
    def told(kind: str) -> str:
        return (
            '<?xml version="1.0" encoding="utf-8"?><PerkinElmer-QPI-ImageDescription>'
            f"<DescriptionVersion>2</DescriptionVersion><ImageType>{kind}</ImageType>"
            "</PerkinElmer-QPI-ImageDescription>"
        )

    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        software = {"software": "PerkinElmer-QPI"}
        tiff.write(pixels, **_tiled(description=told("FullResolution"), **software, **_per_cm(mpp)))
        thumbnail = np.ascontiguousarray(pixels[::8, ::8])
        tiff.write(thumbnail, photometric="rgb", metadata=None, description=told("Thumbnail"), **software)
        reduced = _tiled(description=told("ReducedResolution"), subfiletype=1, **software, **_per_cm(2 * mpp))
        tiff.write(halved(pixels), **reduced)
        tiff.write(_label(), photometric="rgb", metadata=None, description=told("Label"), **software)


def ndpi(path: Path, pixels: Pixels, mpp: float) -> None:
    """A TIFF in name: 64-bit offsets in a 32-bit layout, each level one JPEG strip with restart markers."""
    levels = [(pixels, 20.0), (halved(pixels), 10.0)]
    content = bytearray(b"II*\0" + bytes(8))
    link = 4  # where the next directory's offset belongs
    for number, (level, lens) in enumerate(levels):
        buffer = io.BytesIO()
        blocks = TILE_PX // 16  # 4:2:2: a block is 16 x 8 px; so each piece is 128 x 8 px
        Image.fromarray(level).save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:2", restart_marker_blocks=blocks)
        jpeg = buffer.getvalue()
        strip = len(content)
        content += jpeg + bytes(len(jpeg) % 2)
        numbers = len(content)
        content += (
            struct.pack("<2I", round(1e4 / (mpp * 2**number) * 1000), 1000)
            + b"Hamamatsu\0"
            + struct.pack("<3H", 8, 8, 8)
        )
        make, bits = numbers + 8, numbers + 18
        float_lens = struct.unpack("<I", struct.pack("<f", lens))[0]
        height, width = level.shape[:2]
        tags = [
            (256, 4, 1, width),
            (257, 4, 1, height),
            (258, 3, 3, bits),
            (259, 3, 1, 7),
            (262, 3, 1, 6),
            (271, 2, 10, make),
            (273, 4, 1, strip),
            (277, 3, 1, 3),
            (278, 4, 1, height),
            (279, 4, 1, len(jpeg)),
            (282, 5, 1, numbers),
            (283, 5, 1, numbers),
            (296, 3, 1, 3),
            (65420, 4, 1, 1),
            (65421, 11, 1, float_lens),
            (65422, 9, 1, 0),
            (65423, 9, 1, 0),
            (65424, 9, 1, 0),
        ]
        struct.pack_into("<Q", content, link, len(content))
        content += struct.pack("<H", len(tags)) + b"".join(struct.pack("<2H2I", *tag) for tag in tags)
        link = len(content)
        content += bytes(8) + bytes(4 * len(tags))  # the next directory's offset, and the tags' upper halves
    path.write_bytes(content)


def mirax(path: Path, pixels: Pixels, mpp: float) -> None:
    """A1.mrxs, and the folder A1 beside it with the pixels. No overlap, and no camera positions."""
    folder = path.with_suffix("")
    folder.mkdir()
    columns, rows = pixels.shape[1] // TILE_PX, pixels.shape[0] // TILE_PX
    data, pages = bytearray(b"x" * 16), []
    for step, level in ((1, pixels), (2, halved(pixels))):
        records = []
        for row in range(0, rows, step):
            for column in range(0, columns, step):
                y, x = row // step * TILE_PX, column // step * TILE_PX
                buffer = io.BytesIO()
                Image.fromarray(level[y : y + TILE_PX, x : x + TILE_PX]).save(buffer, "JPEG", quality=QUALITY)
                records.append(struct.pack("<4i", row * columns + column, len(data), len(buffer.getvalue()), 0))
                data += buffer.getvalue()
        pages.append(records)
    (folder / "Data0000.dat").write_bytes(data)
    slide_id = "0123456789abcdef0123456789abcdef"
    index = bytearray(b"01.02" + slide_id.encode() + bytes(8))
    root = len(index) - 8
    starts = []
    for records in pages:
        page = len(index)
        index += struct.pack("<2i", len(records), 0) + b"".join(records)
        starts.append(len(index))
        index += struct.pack("<2i", 0, page)
    struct.pack_into("<i", index, root, len(index))
    index += struct.pack("<2i", *starts)
    (folder / "Index.dat").write_bytes(index)
    zoom = "".join(
        f"[LAYER_0_LEVEL_{number}_SECTION]\nOVERLAP_X = 0\nOVERLAP_Y = 0\n"
        f"MICROMETER_PER_PIXEL_X = {mpp * 2**number}\nMICROMETER_PER_PIXEL_Y = {mpp * 2**number}\n"
        f"IMAGE_FORMAT = JPEG\nIMAGE_FILL_COLOR_BGR = 16777215\nDIGITIZER_WIDTH = {TILE_PX}\n"
        f"DIGITIZER_HEIGHT = {TILE_PX}\nIMAGE_CONCAT_FACTOR = {number}\n"
        for number in (0, 1)
    )
    (folder / "Slidedat.ini").write_text(
        f"[GENERAL]\nSLIDE_VERSION = 01.02\nSLIDE_ID = {slide_id}\nIMAGENUMBER_X = {columns}\n"
        f"IMAGENUMBER_Y = {rows}\nOBJECTIVE_MAGNIFICATION = 20\n"
        "[HIERARCHICAL]\nHIER_COUNT = 1\nNONHIER_COUNT = 0\nINDEXFILE = Index.dat\n"
        "HIER_0_NAME = Slide zoom level\nHIER_0_COUNT = 2\n"
        "HIER_0_VAL_0_SECTION = LAYER_0_LEVEL_0_SECTION\nHIER_0_VAL_1_SECTION = LAYER_0_LEVEL_1_SECTION\n"
        f"[DATAFILE]\nFILE_COUNT = 1\nFILE_0 = Data0000.dat\n{zoom}"
    )
    Image.fromarray(np.ascontiguousarray(pixels[::8, ::8])).save(path, "JPEG")  # the file itself is but a thumbnail


# vendor as scan names it: file name, writer
WRITERS: dict[str, tuple[str, Callable[[Path, Pixels, float], None]]] = {
    "philips": ("A1.tiff", philips),
    "trestle": ("A1.tif", trestle),
    "leica": ("A1.scn", leica),
    "ventana": ("A1.bif", ventana),
    "perkinelmer": ("A1.qptiff", qptiff),
    "hamamatsu": ("A1.ndpi", ndpi),
    "mirax": ("A1.mrxs", mirax),
}
