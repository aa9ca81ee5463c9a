"""The rooms import downwards only, and the command line answers without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from histossl.__main__ import start

PACKAGE = Path(__file__).parents[1] / "histossl"

# From the top of the house to its cellar. A file may import from its own floor and from floors below it.
FLOORS = [
    {"cli", "__main__"},
    {"demo.run"},
    {"report", "training.pretrain", "evaluation", "curation"},
    {"training"},
    {"methods"},
    {"views", "backbones", "tiles"},
    {"slides", "demo"},
    {"units", "config", "errors", "workspace", "console", "launched", "workers", "text", "anonymous", "__init__"},
]


def floor_of(module: str) -> int:
    """The first floor that names the module or, failing that, its room."""
    for names in (module, module.partition(".")[0]):
        for number, floor in enumerate(FLOORS):
            if names in floor:
                return number
    raise AssertionError(f"histossl/{module}: on no floor; say in this test where it belongs")


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere in it, type-checking imports apart."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("histossl"):
            inside = (node.module or "").removeprefix("histossl").removeprefix(".")
            names = [f"{inside}.{alias.name}".removeprefix(".") for alias in node.names]
            for name in names:
                path_of = PACKAGE.joinpath(*name.split("."))
                found.add(name if path_of.with_suffix(".py").exists() or path_of.is_dir() else inside or "__init__")
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("histossl.") for alias in node.names if alias.name.startswith("histossl.")
            }
    return found


def test_imports_go_downwards_only() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") or "__init__"
        wrong += [f"{module} imports {other}" for other in imported(path) if floor_of(other) < floor_of(module)]
    assert not wrong


def test_the_rule_sees_an_upward_import(tmp_path: Path) -> None:
    upward = tmp_path / "x.py"
    upward.write_text("def f():\n    from histossl.training.loop import train\n")
    assert imported(upward) == {"training.loop"}
    assert floor_of("training.loop") < floor_of("tiles.store")


def test_only_the_command_line_and_the_console_speak_rich_and_typer() -> None:
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        if room not in ("cli", "console.py"):
            text = path.read_text(encoding="utf-8")
            assert "import rich" not in text, path
            assert "from rich" not in text, path
            assert "typer" not in text, path


def test_help_of_every_command_imports_nothing_heavy() -> None:
    script = (
        "import sys, contextlib, io\n"
        "from histossl.cli import app, main\n"
        "import typer\n"
        "names = list(typer.main.get_command(app).commands)\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    assert main(['--help']) == 0\n"
        "    for name in names: assert main([name, '--help']) == 0, name\n"
        "heavy = {'torch', 'timm', 'sklearn', 'matplotlib', 'scipy', 'openslide', 'tifffile', 'faiss'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert len(names) >= 5, names\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_while_the_commands_are_loading_is_no_traceback(monkeypatch):
    class Interrupted:
        def find_spec(self, name, *_):
            if name == "histossl.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "histossl.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        start()
    assert ended.value.code == 130
