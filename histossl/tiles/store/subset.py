"""Named subsets of the tiles: sorted tile numbers in one memory-mapped file, never a copy of a tile.

WORKSPACE/subsets/NAME/
    run.json        how it was made, and of which tiles (the index's digest)
    ledger.json     what was kept and dropped, and the subset's own digest
    tiles.npy       int64, rising; written last: its presence means that the subset is finished
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histossl.core.anonymous import names_above
from histossl.core.config import read_run
from histossl.core.errors import MismatchError, StoreError, UsageError
from histossl.core.options import nearest
from histossl.core.workspace import SubsetDir, Workspace, written_aside
from histossl.tiles.store.index import TileIndex
from histossl.tiles.stream.sampler import Ints


@dataclass(frozen=True)
class Subset:
    name: str
    tiles: Ints  # memory-mapped, rising
    digest: str

    def facts(self) -> dict[str, Any]:
        """What a run that used it must remember."""
        return {"name": self.name, "digest": self.digest, "num_tiles": len(self.tiles)}

    def counts(self, index: TileIndex) -> NDArray[np.int64]:
        """Its tiles per slide, in the order of `index.slides`."""
        return tiles_per_slide(index, self.tiles)


def tiles_per_slide(index: TileIndex, tiles: Ints) -> NDArray[np.int64]:
    """Of rising tile numbers, in the order of `index.slides`."""
    edges = np.concatenate([[0], np.cumsum(index.counts)])
    return np.diff(np.searchsorted(tiles, edges)).astype(np.int64)


def write_subset(place: SubsetDir, tiles: Ints, ledger: dict[str, Any]) -> None:
    """The ledger, then the tiles. `tiles` must rise."""
    tiles = np.ascontiguousarray(tiles, dtype=np.int64)
    assert len(tiles)
    assert (np.diff(tiles) > 0).all()
    with written_aside(place.ledger) as aside:
        record = names_above(place.ledger).hidden({"digest": _digest(tiles), "num_tiles": len(tiles), **ledger})
        text = json.dumps(record, indent=2)
        aside.write_text(text + "\n", encoding="utf-8")
    with written_aside(place.tiles) as aside, aside.open("wb") as file:
        np.save(file, tiles)


def open_subset(index: TileIndex, name: str) -> Subset:
    """A subset of the workspace that `index` belongs to. Refuses one that is missing, unfinished, or of other tiles."""
    workspace = Workspace.holding(index.path)
    place = workspace.subset(name)
    if not place.tiles.exists():
        if place.root.exists():
            raise UsageError(f"--subset {name}: is not finished; run its `histossl curate --name {name}` again")
        known = finished_subsets(workspace)
        there = f"{nearest(name, known) or '.'} Subsets here: {', '.join(known)}" if known else "; make it with "
        way_out = "" if known else f"`histossl curate --name {name}`"
        raise UsageError(f"--subset {name}: {workspace.subsets_root} holds none of that name{there}{way_out}")
    made_of = read_run(place.run_json).get("tiles", {}).get("digest")
    if made_of != index.digest:
        raise MismatchError(
            f"--subset {name}: was made of other tiles (set {made_of}, now {index.digest}); "
            "make one of these with `histossl curate` and another --name"
        )
    try:
        tiles = np.load(place.tiles, mmap_mode="r", allow_pickle=False)
        ledger = json.loads(place.ledger.read_text(encoding="utf-8"))
        whole = tiles.dtype == np.int64 and len(tiles) == ledger["num_tiles"] and tiles[-1] < len(index)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise _damaged(place, str(error)) from error
    if not whole:
        raise _damaged(place, "tiles.npy is not what ledger.json says")
    return Subset(name, tiles, ledger["digest"])


def finished_subsets(workspace: Workspace) -> list[str]:
    root = workspace.subsets_root
    return sorted(place.name for place in root.iterdir() if (place / "tiles.npy").is_file()) if root.is_dir() else []


def _digest(tiles: Ints) -> str:
    return hashlib.sha256(tiles.tobytes()).hexdigest()[:16]


def _damaged(place: SubsetDir, reason: str) -> StoreError:
    return StoreError(f"{place.root}: damaged subset ({reason}); delete the folder and run its `histossl curate` again")
