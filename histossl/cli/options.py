"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from histossl.core.config import GRIDS, read_toml, require_in_range
from histossl.core.errors import UsageError


class CheckedCommand(TyperCommand):
    """A command that starts only with numbers its options can mean, from the command line or a --config file."""

    def invoke(self, ctx: Any) -> Any:
        _check_ranges(ctx)
        return super().invoke(ctx)


class CheckedGroup(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        _check_ranges(ctx)
        return super().invoke(ctx)


def _check_ranges(context: Any) -> None:
    for name, value in context.params.items():
        require_in_range(name, value)


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


def given_in(context: typer.Context) -> set[str]:
    """The options that stand on the command line or in the file of --config."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}


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


def parsed_by(parse: Callable[[str], object]) -> Callable[[str], str]:
    """Callback of an option that is a number or a word: what `parse` refuses is refused before any work."""

    def check(value: str) -> str:
        parse(value)
        return value

    return check


def scales_of(text: str) -> list[float]:
    """`--mpp`: one number of microns per pixel, or several, finest first."""
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--mpp {text}: must be a number of microns per pixel, or several as 0.5,1,2") from error
    for scale in scales:
        require_in_range("mpp", scale)
    return scales


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
MinSharpnessOption = Annotated[float, typer.Option(help="Tiles less sharp are out of focus. 0: not looked at.")]
MaxFoldOption = Annotated[float, typer.Option(help="Share of a tile that may be folded tissue.")]
MaxInkOption = Annotated[
    float,
    typer.Option(
        help="Share of a tile that pen ink may cover, by the thumbnail and, where a tile is decoded, by its own "
        "pixels: thin strokes show there. Copied tiles are decoded for it on slides whose thumbnail has ink. "
        "1, or --no-reject-pen: off."
    ),
]
MinSaturationOption = Annotated[
    float, typer.Option(help="Mean colour saturation that a tile must have. 0: not looked at.")
]
GridOption = Annotated[
    str,
    typer.Option(
        metavar="|".join(GRIDS),
        help="physical: exactly --tile-px at --mpp. native: the slide's own JPEG tiles, copied, where their "
        "scale is within 5 % of --mpp. auto: copied where they also have --tile-px; else physical, but at the "
        "slide's own scale where that is within 0.5 % of --mpp.",
    ),
]
