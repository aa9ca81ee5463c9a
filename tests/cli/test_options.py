"""What all commands' options have in common."""

import dataclasses

import pytest
import typer

from histossl.cli import app
from histossl.core.config import CurateConfig, EmbedConfig, FinetuneConfig, PretrainConfig, RuntimeConfig
from histossl.core.options import option_of

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
COMMANDS = {
    (name, *inner): command
    for name, one in COMMANDS.items()
    for inner, command in (
        [((each,), it) for each, it in one.commands.items()] if hasattr(one, "commands") else [((), one)]
    )
}
CONFIGS = (PretrainConfig, RuntimeConfig, FinetuneConfig, EmbedConfig, CurateConfig)
# Where 0 is no value of its own but stands for what is worked out.
ZERO = {
    found.name(one.name)
    for config in CONFIGS
    for one in dataclasses.fields(config)
    if (found := option_of(one)) and found.unset is not None and one.default == 0
}
ZERO_IS_NOT_GIVEN = [
    (name, option.opts[-1])
    for name, command in COMMANDS.items()
    for option in command.params
    if option.opts[-1] in ZERO and option.default is None
    if option.opts[-1] != "--workers" or name[0] in ("finetune", "embed", "predict", "suggest", "curate")
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
    assert f"error: {option} 0: must be" in told.err
    assert "leave it out for the default" in told.err


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


NUMBER_OR_WORD = {"--batch-size", "--checkpoint-every", "--gpus", "--mpp", "--budgets", "--clusters"}
WORKED_OUT = {"--weight-decay", "--warmup", "--final-lr", "--workers"}  # -1 of pretrain's: by the planner
FINITE_ONLY = {"--lr", "--weight-decay", "--clip-norm", "--temperature"}  # no number is too large to mean something


def kind_of(option) -> str:
    descriptor = getattr(option, "type_descriptor", None)  # of typer from 0.26 on
    return getattr(getattr(descriptor, "annotation", None) or option.type, "__name__", None) or option.type.name


def is_number(option) -> bool:
    return option.opts[-1] in NUMBER_OR_WORD or kind_of(option) in ("int", "float", "integer")


def absurd_values(option) -> list[str]:
    name = option.opts[0]
    values = ["nan", "inf", "1e400", "x"]
    values += [] if name in WORKED_OUT else ["-1"]
    values += [] if name in FINITE_ONLY else ["99999999999999999999"]
    return values + ([] if name in ("--budgets", "--clusters") else [""])  # without any they are worked out


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_an_absurd_number_is_refused_in_one_line_that_names_its_option(
    name: tuple[str, ...], cli, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("histossl.cli.app", typer.main.get_command(app))  # built once, not for every value
    command = COMMANDS[name]
    required = [word for each in command.params if each.required for word in (each.opts[0], "x")]
    if name == ("bench", "tile"):
        required = ["x"]
    required += ["--output", tmp_path / "out.png"] if any(each.name == "output" for each in command.params) else []
    for option in command.params:
        for value in absurd_values(option) if is_number(option) else ():
            told = cli(*name, *required, option.opts[0], value)
            assert told.code == 2, (option.opts, value, told)
            assert option.opts[-1] in told.err, (value, told)
            assert len(told.err.splitlines()) == 1, (value, told)
    assert not list(tmp_path.iterdir())


def test_the_sweep_meets_the_numbers_of_every_stage() -> None:
    met = {(name[0], option.opts[0]) for name, one in COMMANDS.items() for option in one.params if is_number(option)}
    stages = ("pretrain", "plan", "distill", "finetune", "curate", "embed", "suggest", "views", "demo")
    assert met >= {(stage, "--seed") for stage in stages}
    assert met >= {
        ("scan", "--min-speck-um"),
        ("tile", "--time-limit"),
        ("predict", "--slide-mpp"),
        ("bench", "--tiles"),
    }


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("seed = -1", "--seed -1: must be a whole number from 0 to"),
        ("seed = 99999999999999999999", "--seed 99999999999999999999: must be"),
        ("epochs = nan", "--epochs nan: must be"),
        ("lr = inf", "--lr inf: must be"),
        ("steps = 1.5", "'--steps'"),  # 1 step, once
        ("steps = true", "steps = True: must be one value"),
        ("seed = [1, 2]", "seed = [1, 2]: must be one value"),
        ("set = 'a=1'", 'set = a=1: must be a list of texts, like ["a=1"]'),
        ("compile = 1", "compile = 1: must be true or false"),
    ],
)
def test_a_config_file_takes_what_the_command_line_takes(written: str, said: str, cli, tmp_path) -> None:
    (tmp_path / "run.toml").write_text(written + "\n")
    told = cli("pretrain", "--config", tmp_path / "run.toml", "-w", tmp_path / "lab")
    assert told.code == 2
    assert said in told.err


@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "-inf", "", "x", "99999999999999999999"])
def test_a_knob_set_to_no_usable_number_is_refused(value: str) -> None:
    from histossl.core.config import TuneConfig, with_overrides
    from histossl.core.errors import UsageError
    from histossl.methods import REGISTRY, TAUGHT, classes_of

    for config in [TuneConfig, *(classes_of(method)[1] for method in (*REGISTRY, *TAUGHT))]:
        for field in dataclasses.fields(config):
            kind = type(getattr(config(), field.name))
            if kind is int or (kind is float and value != "99999999999999999999"):
                with pytest.raises(UsageError, match=field.name):
                    with_overrides(config(), [f"{field.name}={value}"])
