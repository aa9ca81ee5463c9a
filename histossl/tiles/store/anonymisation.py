"""Names of slides that have their tiles under another one: a pseudonym, or that of a slide of the same content."""

from __future__ import annotations

from collections.abc import Iterable

from histossl.core.anonymous import names_of
from histossl.core.workspace import Workspace
from histossl.slides.ledger import read_ledger


def holders(workspace: Workspace, slides: Iterable[str]) -> dict[str, str]:
    """Names of slides that have tiles under another name, and the one of `slides` that holds these.

    A slide of an anonymous workspace, and one whose content is tiled as another's.
    """
    names = names_of(workspace)
    found = names.slides()
    for row in read_ledger(workspace.archive_csv):
        if row.slide and row.tile_twin:
            found[row.slide] = row.tile_twin
            found[names.slide(row.slide)] = row.tile_twin  # in a workspace without pseudonyms the same
    known = set(slides)
    for name, holder in found.items():
        for _ in found:  # the twin of a slide that was renamed since
            if holder in known or holder not in found:
                break
            holder = found[holder]
        found[name] = holder
    return {name: holder for name, holder in found.items() if holder in known and name not in known}
