"""What all commands' options have in common."""

import pytest
import typer

from histossl.cli import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
COMMANDS = {
    (name, *inner): command
    for name, one in COMMANDS.items()
    for inner, command in (
        [((each,), it) for each, it in one.commands.items()] if hasattr(one, "commands") else [((), one)]
    )
}
# Where 0 is no value of its own but stands for what is worked out, help shows no default.
ZERO_IS_NOT_GIVEN = [
    (name, option.opts[-1])
    for name, command in COMMANDS.items()
    for option in command.params
    if not option.show_default and option.default == 0 and not isinstance(option.default, bool)
]


def test_there_are_such_options() -> None:
    options = {option for _, option in ZERO_IS_NOT_GIVEN}
    assert {"--steps", "--epochs", "--hours", "--lr", "--layer-decay", "--folds", "--input-px"} <= options


@pytest.mark.parametrize(
    ("name", "option"), ZERO_IS_NOT_GIVEN, ids=lambda value: " ".join(value) if isinstance(value, tuple) else value
)
def test_a_zero_given_by_hand_is_refused_where_it_would_mean_the_default(
    name: tuple[str, ...], option: str, cli
) -> None:
    required = [word for each in COMMANDS[name].params if each.required for word in (each.opts[0], "x")]
    told = cli(*name, *required, option, "0")
    assert told.code == 2
    assert f"error: {option} 0: must be more than 0; leave it out for the default" in told.err


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_a_config_file_is_read_as_notepad_saves_it(cli, tmp_path, coding) -> None:
    (tmp_path / "run.toml").write_text("steps = -1\r\n", encoding=coding)
    assert "--steps -1: must be" in cli("pretrain", "--config", tmp_path / "run.toml").err


def test_a_config_file_in_another_coding_is_refused_with_its_line(cli, tmp_path) -> None:
    (tmp_path / "run.toml").write_bytes(b"steps = 1\nname = 'K\xf6ln'\n")
    told = cli("pretrain", "--config", tmp_path / "run.toml")
    assert (told.code, "run.toml, line 2: is not UTF-8 text; save it as UTF-8" in told.err) == (2, True)


def test_in_a_config_file_a_zero_is_the_default_written_out_and_less_is_refused(cli, tmp_path) -> None:
    for written, said in (("0", "no tiles yet"), ("-1", "--steps -1: must be")):
        (tmp_path / "run.toml").write_text(f"steps = {written}\n")
        told = cli("pretrain", "--config", tmp_path / "run.toml", "-w", tmp_path / "lab")
        assert said in told.err
