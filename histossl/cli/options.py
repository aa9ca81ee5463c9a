"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from histossl.core.anonymous import settle
from histossl.core.config import NAMES_HELP, read_toml
from histossl.core.errors import UsageError
from histossl.core.workspace import Workspace


def _load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Values of a TOML file become the command's defaults: what stands on the command line wins."""
    if path is not None:
        parameter_of = {
            option.lstrip("-").replace("-", "_"): parameter
            for parameter in context.command.params
            for option in parameter.opts
            if parameter.name and not (option.startswith("-") and not option.startswith("--"))
        }
        values = {
            str(parameter_of[key].name): _as_given(path, key, parameter_of[key], value)
            for key, value in read_toml(path, parameter_of).items()
        }
        context.default_map = {**(context.default_map or {}), **values}
    return path


def _as_given(path: Path, key: str, parameter: Any, value: Any) -> Any:
    """A value of a TOML file as it would stand on the command line: click would make 1 of 1.5 and of true."""
    flag, several = getattr(parameter, "is_flag", False), getattr(parameter, "multiple", False)
    wanted = "true or false" if flag else 'a list of texts, like ["a=1"]' if several else "one value"
    right = isinstance(value, bool) if flag else isinstance(value, list) if several else isinstance(value, _SINGLE)
    if not right or (not flag and isinstance(value, bool)):
        raise UsageError(f"--config {path}: {key} = {value}: must be {wanted}")
    return value if flag else [str(each) for each in value] if several else str(value)


_SINGLE = (str, int, float)


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        callback=_load_config,
        is_eager=True,
        help="Read options from a TOML file (names as here, without the dashes in front); the command line wins.",
    ),
]
WorkspaceOption = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        "-w",
        metavar="DIR",
        help="Where tiles, runs and reports lie. Default: $HISTOSSL_WORKSPACE, else ./histossl-workspace.",
        show_default=False,
    ),
]


NamesOption = Annotated[Path | None, typer.Option("--names", metavar="FILE.csv", help=NAMES_HELP, show_default=False)]


def workspace_of(folder: Path | None, names: Path | None) -> Workspace:
    """The workspace of --workspace; an error where it is anonymous and its names are not at hand."""
    at = Workspace.at(folder)
    settle(at, given=names)
    return at


def archive_of(directory: Path | None, slides: Path | None) -> Path:
    """The folder with the slides, named as an argument or with --slides."""
    if directory is not None and slides is not None and directory != slides:
        raise UsageError(f"{directory} and --slides {slides}: two folders; name one")
    found = slides if directory is None else directory
    if found is None:
        raise UsageError("--slides DIR: name the folder that holds the slides")
    return found
