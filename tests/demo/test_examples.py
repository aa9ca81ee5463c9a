"""What the recipes say can be typed: every command and option in examples/*.md exists."""

import re
from pathlib import Path

import pytest
import typer

from histossl.cli import app

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMANDS = typer.main.get_command(app).commands


def typed(page):
    """(command, options) of each `histossl COMMAND ...` in the page's code blocks."""
    blocks = re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    for line in text.splitlines():
        for found in re.finditer(r"(?:^|['\s])(?:-m )?histossl (?P<command>[a-z]+)(?P<rest>[^'&|]*)", line):
            yield found["command"], re.findall(r"(?<!\S)--?[a-z][a-z-]*", found["rest"])


@pytest.mark.parametrize("name", ["own_slides.md", "slurm.md"])
def test_every_command_in_a_recipe_exists(name):
    found = list(typed(EXAMPLES / name))
    assert len(found) >= 6
    for command, options in found:
        assert command in COMMANDS, command
        known = {option for parameter in COMMANDS[command].params for option in parameter.opts}
        assert set(options) <= known, (command, set(options) - known)
