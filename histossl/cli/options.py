"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from histossl.core.anonymous import settle
from histossl.core.config import read_toml
from histossl.core.errors import UsageError
from histossl.core.workspace import Workspace


def _load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Values of a TOML file become the command's defaults: what stands on the command line wins."""
    if path is not None:
        name_of = {
            option.lstrip("-").replace("-", "_"): parameter.name
            for parameter in context.command.params
            for option in parameter.opts
            if parameter.name and not (option.startswith("-") and not option.startswith("--"))
        }
        values = {name_of[key]: value for key, value in read_toml(path, name_of).items()}
        context.default_map = {**(context.default_map or {}), **values}
    return path


# Options with a --no- beside them: in a panel with others their second name takes all the room that 80 columns have.
ON_OFF = "On or off"


def above_0(context: typer.Context, parameter: typer.CallbackParam, value: float) -> float:
    """Callback of options whose default, 0, means 'work it out': a person who types 0 means something else.

    (In a --config file a 0 is the default, written out.)
    """
    given = context.get_parameter_source(str(parameter.name))
    if value < 0 or (value == 0 and given is not None and given.name == "COMMANDLINE"):
        option = str(parameter.name).replace("_", "-")
        raise UsageError(f"--{option} {value:g}: must be more than 0; leave it out for the default")
    return value


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
NAMES_HELP = (
    "Of an anonymous workspace: the private file that says whose its pseudonyms are. Default: where it was last, at "
    "first WORKSPACE-names.csv beside the workspace."
)
ANONYMIZE_HELP = (
    "Make a new workspace anonymous: slides, files, folders and patients have pseudonyms (keyed hashes) in all that is "
    "written below it. The names are in one private file beside it, see --names."
)
NamesOption = Annotated[
    Path | None,
    typer.Option(
        "--names",
        metavar="FILE.csv",
        help=NAMES_HELP,
        show_default=False,
    ),
]
AnonymizeOption = Annotated[
    bool,
    typer.Option(
        "--anonymize",
        help=ANONYMIZE_HELP,
    ),
]


def workspace_of(folder: Path | None, names: Path | None) -> Workspace:
    """The workspace of --workspace; an error where it is anonymous and its names are not at hand."""
    at = Workspace.at(folder)
    settle(at, given=names)
    return at


SlidesOption = Annotated[
    Path | None,
    typer.Option(
        "--slides",
        metavar="DIR",
        help="Folder with the slides (searched through all its subfolders).",
        show_default=False,
    ),
]

DirectoryArgument = Annotated[
    Path | None,
    typer.Argument(metavar="DIR", help="The same as --slides DIR.", show_default=False),
]


def archive_of(directory: Path | None, slides: Path | None) -> Path:
    """The folder with the slides, named as an argument or with --slides."""
    if directory is not None and slides is not None and directory != slides:
        raise UsageError(f"{directory} and --slides {slides}: two folders; name one")
    found = slides if directory is None else directory
    if found is None:
        raise UsageError("--slides DIR: name the folder that holds the slides")
    return found


# ---- what scan and tile mean by scale and by tissue

SLIDE_MPP_HELP = "Microns per pixel of all slides here, over what they say; those that say otherwise get a warning."
MPP_CSV_HELP = "The same slide by slide: columns slide,mpp."
SlideMppOption = Annotated[float | None, typer.Option(help=SLIDE_MPP_HELP, show_default=False)]
MppCsvOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE.csv", help=MPP_CSV_HELP, show_default=False),
]
MinTissueOption = Annotated[float, typer.Option(help="Share of a tile that must be tissue.")]
TissueUmOption = Annotated[float, typer.Option(help="Microns per pixel of the thumbnail on which tissue is sought.")]
TissueThresholdOption = Annotated[
    float, typer.Option(help="Optical density that divides tissue from glass. 0: found by Otsu's method.")
]
MinSpeckOption = Annotated[float, typer.Option(help="Tissue smaller than a square of this side is dust.")]
MaxHoleOption = Annotated[float, typer.Option(help="A hole smaller than a square of this side belongs to the tissue.")]
RejectPenOption = Annotated[
    bool,
    typer.Option(
        rich_help_panel=ON_OFF,
        help="Count pen ink, dirt and the edges of cover slips, grey or coloured, as no tissue. What ink a tile may "
        "hold beside enough tissue is tile's --max-ink.",
    ),
]
