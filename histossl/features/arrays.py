"""Features made elsewhere: NumPy arrays or HDF5 files become bags for heads, checked, without torch.

One item's features are a *piece*: an array (N, D) of N tiles, an array (D,), or an HDF5 file with a dataset `features`.
What a caller gives for all items is one of

    an array (items, D) or (items, N, D)      one row, or one bag, per item
    a list of pieces                          in the order of the items
    a folder of .h5 or .hdf5 files            ITEM.h5, also in subfolders

Features are taken as float32, as files of features hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from histossl.core.errors import UsageError

Floats = NDArray[np.float64]
Tiles = NDArray[np.float32]
Piece = ArrayLike | Path | str
Features = ArrayLike | Path | str | Sequence[Piece]
SUFFIXES = (".h5", ".hdf5")
SHOWN = 3  # names in an error


@dataclass(frozen=True)
class LoadedBags:
    """The items' features: the mean per item at hand, (items, D); all tiles of an item, (N, D), on request."""

    pooled: Floats
    load: Callable[[int], Tiles]

    def tiles(self, item: int) -> Tiles:
        return self.load(item)


def is_path(features: object) -> bool:
    return isinstance(features, Path | str)


def files_in(folder: Path | str, start: str) -> dict[str, Path]:
    """Item name (path below the folder, without suffix) -> file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"features {start!r}: {folder} is no folder; give a folder of HDF5 files, or a list of files")
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise UsageError(f"features {start!r}: {found[name]} and {path} are of one item; remove one of them")
        found[name] = path
    if not found:
        raise UsageError(f"features {start!r}: {folder} holds no {' or '.join(SUFFIXES)} file")
    return found


def names_of_files(pieces: Sequence[Piece]) -> list[str] | None:
    """The items' names, where the pieces are files of different names."""
    if not all(is_path(piece) for piece in pieces):
        return None
    names = [Path(str(piece)).stem for piece in pieces]
    return names if len({*names}) == len(names) else None


def pieces_of(features: Features, start: str, names: Sequence[str] | None) -> list[Piece]:
    """One piece per item, in the order of `names` for a folder, else as given."""
    if isinstance(features, Path | str):
        folder = Path(features)
        files = files_in(folder, start)
        missing = [name for name in names or () if name not in files]
        if missing:
            more = f" and {len(missing) - SHOWN} more" * (len(missing) > SHOWN)
            raise UsageError(
                f"features {start!r}: {folder} has no file for {', '.join(map(repr, missing[:SHOWN]))}{more}; "
                f"its files are named like {next(iter(files))!r}"
            )
        assert names is not None
        return [files[name] for name in names]
    if isinstance(features, Mapping | set | frozenset):
        raise UsageError(
            f"features {start!r}: a {type(features).__name__} has no order; give a list, in that of labels"
        )
    if not isinstance(features, Sequence):
        array = np.asarray(features)
        if array.ndim not in (2, 3):
            raise UsageError(
                f"features {start!r}: an array of shape {array.shape}; must be (items, D), or (items, N, D) for N "
                "tiles of each item"
            )
        return list(array)
    return list(features)


def load_bags(pieces: Sequence[Piece], start: str, names: Sequence[str]) -> LoadedBags:
    """Each piece is read once, checked, and its mean is kept. UsageError names the item that cannot be used."""
    pooled: list[Floats] = []
    for piece, name in zip(pieces, names, strict=True):
        tiles = _tiles(piece, f"features {start!r}, item {name!r}")
        if pooled and tiles.shape[1] != len(pooled[0]):
            raise UsageError(
                f"features {start!r}, item {name!r}: {tiles.shape[1]} features where item {names[0]!r} has "
                f"{len(pooled[0])}; all items of one start must come from one model"
            )
        # The mean as histossl's own files of features keep it, so that arrays and files give the same numbers.
        pooled.append(tiles.mean(0, dtype=np.float64).astype(np.float32).astype(np.float64))
    return LoadedBags(np.stack(pooled), lambda item: _tiles(pieces[item], f"features {start!r}, item {names[item]!r}"))


def _tiles(piece: Piece, where: str) -> Tiles:
    given: NDArray[Any] = _read(Path(str(piece)), where) if is_path(piece) else np.asarray(piece)
    if given.dtype.kind not in "fiub":
        raise UsageError(f"{where}: values of type {given.dtype}; must be numbers")
    # Slide-level files hold (D,), and some tools keep a leading batch dimension of one.
    shaped = given[None] if given.ndim == 1 else given[0] if given.ndim == 3 and len(given) == 1 else given
    if shaped.ndim != 2 or not shaped.size:
        raise UsageError(f"{where}: an array of shape {given.shape}; must be (N, D), with a tile or more")
    with np.errstate(over="ignore"):
        tiles: Tiles = np.ascontiguousarray(shaped, dtype=np.float32)
    bad = int((~np.isfinite(tiles).all(1)).sum())
    if bad:
        raise UsageError(
            f"{where}: {bad} of {len(tiles)} rows hold NaN, infinity or more than float32 can; leave these tiles out, "
            "or make the features again"
        )
    return tiles


def _read(path: Path, where: str) -> NDArray[Any]:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if "features" not in file or not isinstance(file["features"], h5py.Dataset):
                held = ", ".join(map(repr, file)) or "nothing"
                raise UsageError(f"{where}: {path} has no dataset 'features' (it holds {held})")
            found: NDArray[Any] = file["features"][()]
            return found
    except OSError as error:
        raise UsageError(f"{where}: {path} cannot be read as HDF5 ({error})") from error
