"""Who may import what: rich and typer are the command line's, and help answers without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from histossl.__main__ import start

PACKAGE = Path(__file__).parents[1] / "histossl"


def test_only_the_command_line_and_the_console_speak_rich_and_typer() -> None:
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE)
        if inside.parts[0] != "cli" and inside.as_posix() != "core/console.py":
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
