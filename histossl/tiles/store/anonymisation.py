"""What the zips of a store are named: as their slides, or in an anonymous store by a keyed hash."""

from __future__ import annotations

import csv
import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping

from histossl.core.config import TileConfig
from histossl.core.errors import StoreError
from histossl.core.workspace import Workspace, written_aside
from histossl.slides.ledger import read_ledger
from histossl.tiles.store.index import find_zips


class Names:
    """Slide ids, or keyed hashes of them with the mapping in one file outside the store."""

    def __init__(self, workspace: Workspace, config: TileConfig) -> None:
        self._path = workspace.anonymous_names
        self._tiles = workspace.tiles
        self._given: dict[str, tuple[str, str]] = {}
        self._changed = False
        self.key = b""
        if config.anonymize:
            self._read()

    def of(self, slide: str, file: str) -> str:
        if not self.key:
            return slide
        name = hmac.new(self.key, slide.encode(), hashlib.sha256).hexdigest()[:16]
        if self._given.get(name) != (slide, file):
            self._given[name] = (slide, file)
            self._changed = True
        return name

    def file_of(self, name: str) -> str:
        """Of an anonymous store: the file that a zip's name stands for; empty if it is not known."""
        return self._given.get(name, ("", ""))[1]

    def _read(self) -> None:
        try:
            with self._path.open(encoding="utf-8", newline="") as text:
                self.key = bytes.fromhex(text.readline().split()[-1])
                self._given = {row["name"]: (row["slide"], row["file"]) for row in csv.DictReader(text)}
        except FileNotFoundError as error:
            if find_zips(self._tiles):
                raise StoreError(
                    f"{self._path}: gone, and with it the key to the names of the tiles in {self._tiles}. "
                    "Restore it, or use another --workspace"
                ) from error
            self.key = secrets.token_bytes(32)
            self._changed = True
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise StoreError(
                f"{self._path}: cannot be read ({error}); without its key and names the tiles cannot be continued. "
                "Restore it, or use another --workspace"
            ) from error

    def write(self) -> None:
        """Before any tile is: no anonymous zip is ever without its entry here."""
        if not self._changed:
            return
        with written_aside(self._path) as aside, aside.open("w", encoding="utf-8", newline="") as text:
            aside.chmod(0o600)
            text.write(f"# keep this file private: it names the slides. key {self.key.hex()}\n")
            table = csv.writer(text, lineterminator="\n")
            table.writerow(["name", "slide", "file"])
            table.writerows([name, *given] for name, given in sorted(self._given.items()))


def holders(workspace: Workspace, slides: Iterable[str]) -> dict[str, str]:
    """Names of slides that have tiles under another name, and the one of `slides` that holds these.

    A slide of an anonymous store, and one whose content is tiled as another's.
    """
    given: Mapping[str, tuple[str, str]] = {}
    if workspace.anonymous_names.exists():
        given = Names(workspace, TileConfig(anonymize=True))._given
    found = {slide: name for name, (slide, _) in given.items()}
    found |= {row.slide: row.tile_twin for row in read_ledger(workspace.archive_csv) if row.slide and row.tile_twin}
    known = set(slides)
    for name, holder in found.items():
        for _ in found:  # the twin of a slide that was renamed since
            if holder in known or holder not in found:
                break
            holder = found[holder]
        found[name] = holder
    return {name: holder for name, holder in found.items() if holder in known and name not in known}
