"""examples/options.md lists every option of every command as the configs have them.

python tests/cli/test_options_page.py      write it again
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from histossl.cli import app

PAGE = Path(__file__).parents[2] / "examples" / "options.md"
HEAD = """# Every option of every command

Made from the fields of the configs by `tests/cli/test_options_page.py`, which a test holds it against. Each may also
stand in a file for `--config FILE.toml`, without the dashes in front.
"""
EVERYWHERE = {"--help", "--config"}


def commands() -> Iterator[tuple[str, Any]]:
    for name, one in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        yield name, one
        for inner, it in getattr(one, "commands", {}).items():
            yield f"{name} {inner}", it


def row(option: Any) -> str:
    flags = ", ".join(f"`{each}`" for each in (*option.opts, *option.secondary_opts))
    shown = option.default if option.show_default and option.default not in (None, "", ()) else ""
    text = " ".join((getattr(option, "help", None) or "").split()).replace("|", "\\|").replace("\\[", "[")
    value = f"`{option.metavar}`".replace("|", "\\|") if option.metavar else ""
    return f"| {flags} | {value} | {shown} | {text} |"


def page() -> str:
    parts = [HEAD]
    for name, command in commands():
        rows = [row(one) for one in command.params if not EVERYWHERE & {*one.opts}]
        if rows:
            parts.append(
                f"\n## histossl {name}\n\n| option | value | default | what it does |\n| --- | --- | --- | --- |\n"
            )
            parts.append("\n".join(rows) + "\n")
    return "".join(parts)


def test_the_page_is_what_the_commands_take() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/cli/test_options_page.py"


def test_the_page_shows_names_defaults_and_meanings() -> None:
    text = page()
    assert "| `--batch-size` | `N\\|auto` | 256 | Tiles per optimizer step" in text
    assert "| `--reject-pen`, `--no-reject-pen` |" in text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
