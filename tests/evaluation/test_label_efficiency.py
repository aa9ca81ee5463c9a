"""The curve of any features: the numbers of `finetune` on the same features, and what cannot be used is named."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from synthetic_store import write_synthetic_store

import histossl
from histossl.backbones.loading import create_backbone, save_backbone
from histossl.core.config import FinetuneConfig
from histossl.core.workspace import Workspace
from histossl.evaluation.finetune import finetune
from histossl.evaluation.label_efficiency import label_efficiency

SLIDES = [f"case{number % 4}/s{number:02d}" for number in range(24)]
CLASSES = ("low", "high")
TABLES = ("points.csv", "summary.csv", "predictions.csv")
STARTS = ("random", "adapted", "colour")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    """24 slides of 12 patients at 6 sites, a backbone called adapted, and labels that red separates in part."""
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    write_synthetic_store(workspace, SLIDES, tiles_per_slide=[2 + number % 4 for number in range(24)], tile_px=32)
    backbone, info = create_backbone("test_vit", "random", 3)
    # Its pretraining is not known to label_efficiency, so it is not known here: the limits then read alike.
    save_backbone(workspace.pretrain("adapted").backbone, backbone, replace(info, input_px=32))
    lines = [
        f"{slide}.svs,{CLASSES[number % 12 % 5 < 2]},P{number % 12},{'ABCDEF'[number % 12 // 2]},"
        f"{'test' if number % 12 in (1, 3, 4, 5, 6, 7) else 'train'}"
        for number, slide in enumerate(SLIDES)
    ]
    for name, columns in {"labels": 3, "sites": 4, "fixed": 5}.items():
        head = ["slide,label,patient,site,split", *lines]
        (workspace.root / f"{name}.csv").write_text(
            "\n".join(",".join(line.split(",")[:columns]) for line in head) + "\n"
        )
    return workspace


def config_of(workspace: Workspace, labels: str = "labels", **options) -> FinetuneConfig:
    common = {"starts": STARTS, "backbone": "test_vit", "input_px": 32, "draws": 3}
    return FinetuneConfig(labels=str(workspace.root / f"{labels}.csv"), **{**common, **options})


def folders(workspace: Workspace, run: str) -> dict[str, Path]:
    starts = json.loads(workspace.finetune(run).run_json.read_text())["starts"]
    return {name: workspace.embeddings(one["embeddings"]) for name, one in starts.items()}


def rows_of(labels: Path) -> dict[str, list[str]]:
    lines = [line.split(",") for line in labels.read_text().splitlines()]
    return {name: [line[place] for line in lines[1:]] for place, name in enumerate(lines[0])}


def same_as_finetune(result: histossl.CurveResult, workspace: Workspace, run: str, folder: Path) -> None:
    result.to_csv(folder)
    directory = workspace.finetune(run)
    for name in TABLES:
        assert (folder / name).read_bytes() == (directory.root / name).read_bytes(), name
    told = json.loads(directory.run_json.read_text())["verdict"]
    assert (told["outcome"], told["headline"]) == (result.verdict.outcome, result.headline)
    assert (told["sentences"], told["reference"]) == (result.verdict.sentences, result.reference)


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        ("labels", {"draws": 2, "budgets": (1, 4)}),
        ("sites", {"group": "site", "head": "simpleshot"}),
        ("fixed", {"head": "knn", "budgets": (1, 3, "all"), "seed": 7}),
    ],
)
def test_files_of_features_and_labels_csv_give_finetune_s_numbers_digit_for_digit(workspace, tmp_path, labels, options):
    config = config_of(workspace, labels, **options)
    finetune(workspace, labels, config)
    settings = {"draws": config.draws, **{name: value for name, value in options.items() if name != "head"}}
    result = label_efficiency(
        folders(workspace, labels),
        Path(config.labels),
        heads=config.head,
        **settings,
    )
    same_as_finetune(result, workspace, labels, tmp_path)


def test_arrays_in_any_order_give_finetune_s_numbers_digit_for_digit(workspace, tmp_path):
    config = config_of(workspace, "sites", starts=("random", "adapted"), draws=2, budgets=(2, "all"))
    finetune(workspace, "arrays", config)
    rows = rows_of(Path(config.labels))
    order = np.random.default_rng(0).permutation(len(SLIDES))
    named = {name: [values[number] for number in order] for name, values in rows.items()}
    slides = [name.removesuffix(".svs") for name in named["slide"]]
    bags: dict[str, list[np.ndarray]] = {}
    for start, folder in folders(workspace, "arrays").items():
        for slide in slides:
            with h5py.File(folder / f"{slide}.h5") as file:
                bags.setdefault(start, []).append(file["features"][:])
    means = {start: np.stack([bag.mean(0, dtype=np.float64) for bag in own]) for start, own in bags.items()}
    starts = list(folders(workspace, "arrays"))
    for features in (bags, means):
        result = label_efficiency(
            {start: features[start] for start in starts if start in features},
            named["label"],
            named["patient"],
            config.budgets,
            config.draws,
            names=slides,
            sites=named["site"],
        )
        kept = label_of_starts(workspace.finetune("arrays").root, starts)
        result.to_csv(tmp_path)
        for name in TABLES:
            assert (tmp_path / name).read_text() == kept[name], name


def label_of_starts(folder: Path, starts: list[str]) -> dict[str, str]:
    """The tables' text, of these starts alone."""
    found = {}
    for name in TABLES:
        head, *lines = (folder / name).read_text().splitlines()
        kept = [line for line in lines if line.split(",")[0] in starts]
        found[name] = "\n".join([head, *kept]) + "\n"
    return found


def test_attention_over_the_tiles_gives_finetune_s_numbers(workspace, tmp_path):
    config = config_of(workspace, starts=("random", "adapted"), head="abmil", draws=1, folds=2, budgets=(2,))
    finetune(workspace, "abmil", config)
    own = {name: folder for name, folder in folders(workspace, "abmil").items() if name != "colour"}
    result = label_efficiency(own, Path(config.labels), draws=1, folds=2, budgets=(2,), heads="abmil")
    result.to_csv(tmp_path)
    kept = label_of_starts(workspace.finetune("abmil").root, list(own))
    assert (tmp_path / "predictions.csv").read_text() == kept["predictions.csv"]


# ---- arrays alone

NUM = 40
LABELS = np.array(["ill", "well"])[np.arange(NUM) % 2]
PATIENTS = np.arange(NUM) // 4 * 2 + np.arange(NUM) % 2
QUICK = {"draws": 2, "budgets": (1, 4), "heads": "simpleshot"}


def informative(strength: float, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((NUM, 12))
    x[:, :6] += strength * (np.arange(NUM) % 2)[:, None]
    return x


def test_the_better_features_win_and_the_result_holds_all_of_it(tmp_path):
    features = {"plain": informative(0.0), "better": informative(3.0)}
    result = label_efficiency(
        features, LABELS, PATIENTS, draws=3, budgets=np.array([1, 2, 4]), heads=["simpleshot", "knn"]
    )
    assert (result.reference, result.verdict.outcome) == ("plain", "helped")
    assert "Better in place of plain helped" in result.headline
    assert {(row.start, row.head) for row in result.summary} == {
        (s, h) for s in features for h in ("simpleshot", "knn")
    }
    assert [one.start for one in result.comparisons] == [("better", "simpleshot"), ("better", "knn")]
    assert set(result.saved) == {("better", "simpleshot"), ("better", "knn")}
    assert len(result.predictions) == 2 * 2 * 3 * 3 * NUM  # models, heads, draws, budgets
    assert "better" in str(result)
    assert result.headline[:40] in str(result)
    with pytest.raises(FrozenInstanceError):
        result.reference = "better"
    result.to_csv(tmp_path / "made")
    assert len((tmp_path / "made/comparisons.csv").read_text().splitlines()) == 1 + 2 * (3 + 1)
    assert len((tmp_path / "made/labels_saved.csv").read_text().splitlines()) == 1 + 2 * 3


def test_one_model_has_a_curve_and_no_verdict():
    result = label_efficiency(informative(3.0), LABELS.tolist(), PATIENTS.tolist(), **QUICK)
    assert (result.verdict, result.reference, result.comparisons) == (None, None, ())
    assert "No verdict" in result.headline
    assert {row.start for row in result.summary} == {"features"}


def test_bags_means_files_and_leading_batch_dimensions_are_one_and_the_same(tmp_path):
    rng = np.random.default_rng(1)
    bags = [rng.standard_normal((3, 5)).astype(np.float32) for _ in range(NUM)]
    files = []
    for number, bag in enumerate(bags):
        files.append(tmp_path / f"s{number:02d}.{'h5' if number % 2 else 'hdf5'}")
        with h5py.File(files[-1], "w") as file:
            file.create_dataset("features", data=bag[None] if number % 3 else bag)
    names = [path.stem for path in files]
    means = np.stack([bag.mean(0, dtype=np.float64) for bag in bags])
    given = [bags, np.stack(bags), means, list(means), files, [str(path) for path in files], tmp_path]
    found = [label_efficiency(one, LABELS, PATIENTS, names=names, **QUICK).predictions for one in given]
    assert all(one == found[0] for one in found)
    (tmp_path / "labels.csv").write_text(
        "slide,label,patient\n" + "".join(f"{n},{y},{p}\n" for n, y, p in zip(names, LABELS, PATIENTS, strict=True))
    )
    assert label_efficiency(tmp_path, tmp_path / "labels.csv", **QUICK).predictions == found[0]


def test_a_patient_is_never_trained_on_and_tested():
    """Features that tell the patient and nothing else score no better than chance."""
    rng = np.random.default_rng(2)
    own = rng.standard_normal((PATIENTS.max() + 1, 30))[PATIENTS]
    result = label_efficiency(own, LABELS, PATIENTS, draws=3, budgets=(8,))
    (row,) = (row for row in result.summary if row.metric == "auroc")
    assert row.low <= 0.5
    alone = label_efficiency(own, LABELS, draws=3, budgets=(8,))
    assert any("own patient" in note for note in alone.notes)
    assert next(row.mean for row in alone.summary if row.metric == "auroc") > row.mean + 0.2


def test_it_needs_no_torch_no_timm_no_openslide_and_is_silent():
    script = (
        "import sys, numpy as np, histossl\n"
        "assert not {'sklearn', 'scipy', 'rich', 'h5py'} & set(sys.modules)\n"
        "x = np.random.default_rng(0).standard_normal((24, 4))\n"
        "result = histossl.label_efficiency(x, [0, 1] * 12, draws=1, budgets=(1, 2))\n"
        "assert isinstance(result, histossl.CurveResult)\n"
        "heavy = {'torch', 'torchvision', 'timm', 'openslide'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def with_nan(number: int) -> np.ndarray:
    x = informative(1.0)
    x[number, 3] = np.nan
    return x


REFUSED = {
    "one label too few": ((informative(1.0), LABELS[:-1]), {}, ["features", "40", "39"]),
    "a patient too few": ((informative(1.0), LABELS, PATIENTS[1:]), {}, ["patients", "39", "40"]),
    "a name twice": ((informative(1.0), LABELS), {"names": ["a"] * NUM}, ["names", "'a'", "twice"]),
    "NaN": ((with_nan(7), LABELS), {}, ["features", "item000007", "NaN"]),
    "beyond float32": ((informative(1.0) * 1e300, LABELS), {}, ["features", "item000000", "float32"]),
    "another D": (([np.zeros((2, 4))] * 39 + [np.zeros((2, 5))], LABELS), {}, ["item000039", "5", "4"]),
    "an empty bag": (([np.zeros((0, 4))] * NUM, LABELS), {}, ["item000000", "(0, 4)"]),
    "one number per item": ((np.zeros(NUM), LABELS), {}, ["(40,)", "(items, D)"]),
    "text for features": ((np.full((NUM, 2), "x"), LABELS), {}, ["item000000", "numbers"]),
    "no features": (({}, LABELS), {}, ["features", "empty"]),
    "features without order": (({"uni": set()}, LABELS), {}, ["uni", "order"]),
    "one class": ((informative(1.0), ["ill"] * NUM), {}, ["'ill'", "two classes"]),
    "measurements": ((informative(1.0), np.linspace(0, 1, NUM)), {}, ["labels", "item 0", "float64"]),
    "survival times": ((informative(1.0), np.arange(NUM)), {}, ["labels", "40 different numbers"]),
    "no label": ((informative(1.0), [None, *LABELS[1:]]), {}, ["labels", "item 0", "None", "leave"]),
    "an empty label": ((informative(1.0), ["", *LABELS[1:]]), {}, ["labels", "item 0", "empty"]),
    "text and numbers": ((informative(1.0), [1, *LABELS[1:].tolist()]), {}, ["item 0", "1", "item 1", "'well'"]),
    "spelt twice": ((informative(1.0), ["Ill", *LABELS[1:]]), {}, ["'Ill'", "'ill'", "item 2"]),
    "a word for labels": ((informative(1.0), "labels.csv"), {}, ["labels", "Path('labels.csv')"]),
    "nobody's patient": ((informative(1.0), LABELS, ["nan"] * NUM), {}, ["patients", "item 0", "'nan'"]),
    "mixed patients": ((informative(1.0), LABELS, np.arange(NUM) // 2), {}, ["patients", "pass mixed_patients"]),
    "more folds than patients": ((informative(1.0), LABELS, PATIENTS), {"folds": 11}, ["folds 11", "10 patients"]),
    "a budget too large": ((informative(1.0), LABELS, PATIENTS), {"budgets": (64,)}, ["budgets 64", "all"]),
    "a budget of nothing": ((informative(1.0), LABELS, PATIENTS), {"budgets": (0,)}, ["budgets 0"]),
    "a half budget": ((informative(1.0), LABELS, PATIENTS), {"budgets": (1.5,)}, ["budgets 1.5"]),
    "an unknown head": ((informative(1.0), LABELS, PATIENTS), {"heads": "svm"}, ["head svm", "simpleshot"]),
    "no head": ((informative(1.0), LABELS, PATIENTS), {"heads": ()}, ["heads", "simpleshot"]),
    "no draw": ((informative(1.0), LABELS, PATIENTS), {"draws": 0}, ["draws 0"]),
    "no site": ((informative(1.0), LABELS, PATIENTS), {"group": "site"}, ["group site", "no site"]),
    "a side that is none": ((informative(1.0), LABELS), {"split": ["val"] * NUM}, ["split", "item 0", "'val'"]),
    "an unknown reference": (({"uni": informative(1.0)}, LABELS), {"reference": "unl"}, ["'unl'", "'uni'"]),
    "no such folder": ((Path("/nowhere"), LABELS), {"names": [f"s{n}" for n in range(NUM)]}, ["/nowhere", "folder"]),
    "a folder without names": ((Path("/tmp"), LABELS), {}, ["names", "order"]),
    "arrays and labels.csv": ((informative(1.0), Path("labels.csv")), {}, ["labels.csv", "HDF5"]),
    "patients twice": ((Path("/tmp"), Path("labels.csv"), PATIENTS), {}, ["patients", "leave"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_a_value_error_that_says_what_and_where(case):
    given, options, words = REFUSED[case]
    with pytest.raises(ValueError) as error:
        label_efficiency(*given, **options)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert "--" not in str(error.value)


def test_files_that_do_not_fit_are_named(tmp_path):
    folder = tmp_path / "uni"
    folder.mkdir()
    names = [f"s{number:02d}" for number in range(NUM)]
    for name, row in zip(names, informative(1.0), strict=True):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.create_dataset("features", data=row[None])
    for wrong, words in (
        ([*names[:-1], "absent"], ["'absent'", "'s00'"]),
        (sorted(names, reverse=True), ["order"]),
    ):
        given = folder if "absent" in wrong else [folder / f"{name}.h5" for name in names]
        with pytest.raises(ValueError) as error:
            label_efficiency({"uni": given}, LABELS, PATIENTS, names=wrong, **QUICK)
        assert all(word in str(error.value) for word in ["uni", *words]), str(error.value)
    with h5py.File(folder / "s03.h5", "w") as file:
        file.create_dataset("feats", data=np.zeros((1, 2)))
    (folder / "s05.h5").write_bytes(b"no HDF5")
    for name, words in (("s03", ["'features'", "'feats'"]), ("s05", ["HDF5"])):
        given = [folder / f"{name if one == 's07' else 's08'}.h5" for one in names]
        with pytest.raises(ValueError) as error:
            label_efficiency({"uni": given}, LABELS, PATIENTS, **QUICK)
        assert all(word in str(error.value) for word in [f"{name}.h5", *words]), str(error.value)
