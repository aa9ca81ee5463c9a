"""From the fields of configs to a command's options, and back: no command types an option by hand.

    @command(app, epilog="Example: histossl pretrain --slides /data/slides")
    def pretrain(workspace: Workspace, config: PretrainConfig, runtime: RuntimeConfig, given: Given) -> int: ...

makes `histossl pretrain` with --workspace, --config and an option for each field of the two configs. A field that is
itself a config (`tissue`) lends its fields. `given` says which options a person typed or wrote into a --config file.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from typing import Annotated, Any

import typer

from histossl.cli.options import ConfigOption, NamesOption, WorkspaceOption, workspace_of
from histossl.core.errors import UsageError
from histossl.core.options import Option, is_required, option_of, shown
from histossl.core.workspace import Workspace

# Where `histossl --help` lists a command, in the order of the work.
LOOK, TILES, PRETRAIN, EVALUATE, USE, OTHER = (
    "Look at the slides",
    "Tiles",
    "Pretrain",
    "Evaluate",
    "Use the model and the backbone",
    "Methods, machine, demo",
)
# Options with a --no- form: in a panel with others their second name takes all the room that 80 columns have.
ON_OFF = "On or off"


@dataclass(frozen=True)
class Given:
    """Names of fields whose options stand on the command line or in a --config file."""

    command_line: frozenset[str]
    file: frozenset[str]

    def __contains__(self, name: object) -> bool:
        return name in self.command_line | self.file


@dataclass(frozen=True)
class Slot:
    """One option of a command: the field of a config that it fills."""

    field: Field[Any]
    kind: Any  # the field's type, without None
    option: Option

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def flag(self) -> str:
        return self.option.name(self.name)

    @property
    def default(self) -> Any:
        return None if is_required(self.field) else self.field.default

    def parameter(self) -> inspect.Parameter:
        """The option as typer takes it: a keyword of a function."""
        required, default = is_required(self.field), self.default
        kind: Any
        switched_on = self.kind is bool and default is True
        if typing.get_origin(self.kind) is tuple and self.option.read is None:
            kind, default = list[str] | None, None  # given several times
        else:
            kind = str if self.option.read else self.kind
            if default is None or self.option.unset is not None:
                kind, default = (kind if required else kind | None), None
            elif self.option.read:
                default = shown(self.option, default)
        about: dict[str, Any] = {
            "help": f"{self.option.help} Default: {self.option.unset}." if self.option.unset else self.option.help,
            "metavar": self.option.metavar or None,
            "rich_help_panel": ON_OFF if switched_on else self.option.panel or None,
            "show_default": default is not None and default is not False and default != "",
        }
        names = self.option.flag.split("/") if self.option.flag else [self.flag]
        if switched_on:
            names = [f"{self.flag}/--no-{self.flag.removeprefix('--')}"]
        info = typer.Argument(**about) if self.option.positional else typer.Option(*names, **about)
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if required else default,
            annotation=Annotated[kind, info],
        )

    def value(self, typed: Any, given: Given) -> Any:
        """What the config gets for what was typed or, where nothing was, typer's default."""
        if typed is None or (isinstance(typed, list) and not typed):
            return self.default
        if self.option.read and isinstance(typed, str):
            try:
                typed = self.option.read(typed)
            except ValueError as error:
                raise UsageError(f"{self.flag} {typed}: must be {error}") from error
        elif isinstance(typed, list):
            typed = tuple(typed)
        # A default that means "worked out" is right in a file, where it is written out; a person who types it means it.
        if self.option.unset is not None and typed == self.default and self.name in given.command_line:
            words = self.option.check.words if self.option.check else "a value of its own"
            raise UsageError(f"{self.flag} {shown(self.option, typed)}: must be {words}; leave it out for the default")
        return typed


def slots_of(config: Any) -> Iterator[Slot]:
    hints = typing.get_type_hints(config)
    for one in fields(config):
        kind = hints[one.name]
        if isinstance(kind, types.UnionType):
            kind = next(each for each in typing.get_args(kind) if each is not types.NoneType)
        if is_dataclass(kind):
            yield from slots_of(kind)
        elif found := option_of(one):
            yield Slot(one, kind, found)


def build(config: Any, values: Mapping[str, Any]) -> Any:
    """The config of these values, and those in it; a field without one keeps its default."""
    hints = typing.get_type_hints(config)
    inside = {one.name: build(hints[one.name], values) for one in fields(config) if is_dataclass(hints[one.name])}
    return config(**inside, **{one.name: values[one.name] for one in fields(config) if one.name in values})


def command(
    app: typer.Typer,
    *,
    group: str | None = None,
    epilog: str = "",
    name: str | None = None,
    without: Collection[str] = (),
    change: Mapping[str, Mapping[str, Any]] | None = None,
    callback: bool = False,
    toml: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of configs as a command of `app`.

    `without` names fields that are no options here; `change` says what is different of some: {"tile_px": {"help": ""}}.
    `callback`: what a group of commands does by itself (histossl bench). `toml`: whether there is --config.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        hints = {one: kind for one, kind in typing.get_type_hints(function).items() if one != "return"}
        configs = {one: kind for one, kind in hints.items() if is_dataclass(kind) and kind not in (Given, Workspace)}
        slots: dict[str, Slot] = {}
        owned: dict[str, list[str]] = {one: [] for one in configs}  # of two configs with one field the first has it
        for one, kind in configs.items():
            for slot in slots_of(kind):
                if slot.name in slots and is_required(slot.field):
                    owned[one].append(slot.name)
                elif slot.name not in without and slot.name not in slots:
                    told = (change or {}).get(slot.name, {})
                    slots[slot.name] = replace(slot, option=replace(slot.option, **told))
                    owned[one].append(slot.name)

        begins = "names" in slots  # a command that may begin a workspace settles by itself whether it is anonymous

        def run(context: typer.Context, **typed: Any) -> Any:
            at, names_file = typed.pop("workspace", None), typed.pop("names_file", None)
            given = _given(context)
            values = {slot.name: slot.value(typed[slot.name], given) for slot in slots.values()}
            arguments: dict[str, Any] = {
                one: build(kind, {name: values[name] for name in owned[one]}) for one, kind in configs.items()
            }
            arguments |= {one: given for one, kind in hints.items() if kind is Given}
            for one in (one for one, kind in hints.items() if kind is Workspace):
                arguments[one] = Workspace.at(at) if begins else workspace_of(at, names_file)
            arguments |= {one: context for one, kind in hints.items() if kind is typer.Context}
            return function(**arguments)

        parameters = [slot.parameter() for slot in slots.values()]
        if Workspace in hints.values():
            parameters.append(_keyword("workspace", WorkspaceOption))
            parameters += [] if begins else [_keyword("names_file", NamesOption)]
        if toml and not callback:
            parameters.append(_keyword("config_file", ConfigOption))
        context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        run.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in (context, *parameters)}
        run.__doc__, run.__name__ = function.__doc__, function.__name__
        if callback:
            app.callback()(run)
        else:
            app.command(name, epilog=epilog, rich_help_panel=group)(run)
        return function

    return register


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _given(context: typer.Context) -> Given:
    source = {name: found.name for name in context.params if (found := context.get_parameter_source(name)) is not None}
    return Given(
        frozenset(name for name, where in source.items() if where == "COMMANDLINE"),
        frozenset(name for name, where in source.items() if where == "DEFAULT_MAP"),
    )
