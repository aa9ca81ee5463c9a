"""The house is as ARCHITECTURE.md draws it: floors, no circles, a dozen entries a room, a reason in every file.

python tests/test_rooms.py      write the tree of files in ARCHITECTURE.md again
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "histossl"
ARCHITECTURE = PACKAGE / "ARCHITECTURE.md"
MOST_ENTRIES = 12
LARGER = {"methods": 16, ".": 20, "cli": 17}  # rooms that hold more today; the number may fall, not rise

# From the top of the house to its cellar. A file may import from its own room and from the floors below it.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("demo.run",),
    ("api",),
    ("report",),
    ("evaluation",),
    ("heads", "curation"),
    ("labels",),
    ("features", "bench"),
    ("training",),
    ("methods",),
    ("views",),
    ("tiles",),
    ("slides",),
    ("stats", "runtime", "backbones", "demo"),
    ("core",),
    ("__init__",),
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def floor_of(module: str) -> tuple[int, str]:
    """The floor, and the room on it: the first that names the module or, failing that, its room."""
    for names in (module, module.partition(".")[0]):
        for number, floor in enumerate(FLOORS):
            if names in floor:
                return number, names
    raise AssertionError(f"histossl/{module}: on no floor; say in this test where it belongs")


def imported(text: str) -> set[str]:
    """Modules of the package that a file imports anywhere in it, type-checking imports apart."""
    found = set()
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("histossl"):
            base = (node.module or "").removeprefix("histossl").removeprefix(".")
            names = [f"{base}.{alias.name}".removeprefix(".") for alias in node.names]
            found |= {name if name in MODULES else base or "__init__" for name in names}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {name.removeprefix("histossl.") for name in names if name.startswith("histossl.")}
    return found


def test_imports_go_down_a_floor_or_stay_in_their_room() -> None:
    wrong = []
    for module, path in MODULES.items():
        here, room = floor_of(module)
        for other in imported(path.read_text(encoding="utf-8")):
            there, other_room = floor_of(other)
            if other_room != room and there <= here:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_the_rule_sees_an_upward_import() -> None:
    assert imported("def f():\n    from histossl.training.loop import train\n") == {"training.loop"}
    assert floor_of("training.loop") < floor_of("tiles.store.index")


def rooms() -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for path in MODULES.values():
        folder = path.parent.relative_to(PACKAGE)
        if path.name != "__init__.py":
            found[folder.as_posix()].append(path.name)
        elif folder != Path():
            found[folder.parent.as_posix()].append(f"{folder.name}/")
    return found


def test_a_room_has_a_dozen_entries_at_most() -> None:
    full = {name: len(inside) for name, inside in rooms().items() if len(inside) > LARGER.get(name, MOST_ENTRIES)}
    assert not full
    assert all(len(rooms()[name]) > MOST_ENTRIES for name in LARGER), "a room became small enough: take it off the list"


def test_every_file_and_room_opens_with_its_reason() -> None:
    silent = [module for module, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def tree() -> str:
    """Each file under its room, with the first sentence of its docstring."""
    lines = []

    def add(folder: Path, depth: int) -> None:
        inside = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
        for path in inside:
            name, source = path.name, path
            if path.is_dir():
                name, source = f"{path.name}/", path / "__init__.py"
            if source.suffix != ".py" or not source.exists() or (path.name == "__init__.py" and depth):
                continue
            text = " ".join((ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").split())
            first = textwrap.shorten(re.split(r"\.(?: |$)", text, maxsplit=1)[0], 90, placeholder=" ...")
            lines.append(f"{'    ' * depth}{name:<{30 - 4 * depth}} {first}".rstrip())
            if path.is_dir():
                add(path, depth + 1)

    add(PACKAGE, 0)
    return "\n".join(lines)


MARKS = "<!-- tree: written by tests/test_rooms.py -->\n```text\n", "```\n<!-- end of tree -->"


def parts() -> tuple[str, str, str]:
    """What stands before the tree, the tree, and what stands after it."""
    before, _, rest = ARCHITECTURE.read_text(encoding="utf-8").partition(MARKS[0])
    drawn, _, after = rest.partition(MARKS[1])
    return before + MARKS[0], drawn, MARKS[1] + after


def test_architecture_draws_the_tree_that_is_on_disk() -> None:
    assert parts()[1] == tree(), "run: python tests/test_rooms.py"


@pytest.mark.parametrize("floor", FLOORS)
def test_architecture_names_every_floor(floor: tuple[str, ...]) -> None:
    said = ARCHITECTURE.read_text(encoding="utf-8").replace("/", "")
    for room in set(floor) - {"__init__", "__main__"}:
        assert f"`{room}" in said or f" {room} " in said, room


if __name__ == "__main__":
    before, _, after = parts()
    ARCHITECTURE.write_text(before + tree() + after, encoding="utf-8")
