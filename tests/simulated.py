"""Archives that exist as numbers only: patients with features, a nearest-mean head, predictions with a known truth.

A patient's features are its class's mean, plus what all its slides share, plus what one slide has for itself. The head
is trained and tested as in the real stage (nested budgets, draws, folds by patient), so whatever makes scores of one
archive depend on each other is in here too: few patients, draws from one pool, patients who are tested and trained on.
With sites, whole sites are left out, and patients of one site share a shift whatever their class (a stain), and how far
apart their classes lie (a scanner's focus): a shift moves slides from one class to another, focus moves the score.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import h5py
import numpy as np
from synthetic_store import write_synthetic_store

from histossl.core.workspace import FinetuneDir, Workspace
from histossl.heads.feature_heads import DEFAULT_STRENGTH, _logistic
from histossl.labels.splits import _k_fold
from histossl.stats.tables import Budget, Prediction, read_predictions, write_predictions

DIMENSIONS = 12


@dataclass(frozen=True)
class Archive:
    patients_per_class: int = 12
    classes: tuple[str, ...] = ("normal", "adenoma", "carcinoma")
    # How far apart the classes' means are for each start, in standard deviations of a slide.
    separation: Mapping[str, float] = field(default_factory=lambda: {"imagenet": 1.5, "adapted": 1.5})
    slides_per_patient: int = 1
    patient_share: float = 0.6  # of a slide's variance
    shared: float = 0.3  # of the variance, by all starts: what is hard for one is hard for the others
    budgets: tuple[Budget, ...] = (1, 2, 4, 8)
    num_draws: int = 10
    num_folds: int = 5
    test_patients_per_class: int = 0  # of a fixed test set; then there are no folds
    permuted: bool = False  # labels say nothing
    logistic: bool = False  # the head: logistic regression in place of the nearest mean
    seeds: Mapping[str, int] = field(default_factory=dict)  # starts that are several pretraining runs
    seed_spread: float = 0.0  # standard deviation of the separation between runs
    sites: int = 0  # that patients come from; folds are by site then
    test_sites: int = 0  # that a fixed test set comes from
    site_share: float = 0.0  # of a slide's variance; patient_share is of the same whole
    site_spread: float = 0.0  # standard deviation between sites of the separation, as a share of it
    unequal_sites: bool = False  # sizes of sites as 1 : 2 : 3 ...


def predictions_of(archive: Archive, rng: np.random.Generator) -> list[Prediction]:
    """One archive drawn from the population, and everything that a finetuning would predict on it."""
    num_classes = len(archive.classes)
    fixed = archive.test_patients_per_class
    label_P = np.repeat(np.arange(num_classes), archive.patients_per_class)
    test_P = np.repeat(np.arange(num_classes), fixed)
    every_P = np.concatenate([label_P, test_P])
    patient_N = np.repeat(np.arange(len(every_P)), archive.slides_per_patient)
    tested_site_P = _sites(archive.test_sites, archive.unequal_sites, len(test_P), rng)
    site_P = np.concatenate(
        [_sites(archive.sites, archive.unequal_sites, len(label_P), rng), archive.sites + tested_site_P]
    )
    features = _features(archive, rng, every_P, patient_N, site_P)
    if archive.permuted:
        every_P = np.concatenate([rng.permutation(label_P), rng.permutation(test_P)])
    label_N = every_P[patient_N]
    train_side = np.arange(len(label_P))
    rows: list[Prediction] = []
    for draw in range(archive.num_draws):
        if fixed:
            parts = [(None, train_side, np.arange(len(label_P), len(every_P)))]
        else:
            fold_P = _folds(every_P, archive.num_folds, rng, site_P if archive.sites else None)
            parts = [(k, np.flatnonzero(fold_P != k), np.flatnonzero(fold_P == k)) for k in range(archive.num_folds)]
        for fold, train_P, tested_P in parts:
            order = [
                _order(train_P[every_P[train_P] == k], archive.slides_per_patient, rng) for k in range(num_classes)
            ]
            tested_N = np.flatnonzero(np.isin(patient_N, tested_P))
            for budget in archive.budgets:
                taken = [slides[: None if isinstance(budget, str) else budget] for slides in order]
                for key, x_ND in features.items():
                    start, _, backbone = key.partition("+")
                    logits = _logits(archive, [x_ND[slides] for slides in taken], x_ND[tested_N])
                    shares = np.exp(logits - logits.max(1, keepdims=True))
                    shares /= shares.sum(1, keepdims=True)
                    for slide, share in zip(tested_N, shares, strict=True):
                        rows.append(
                            Prediction(
                                start, "mean", budget, draw, fold, f"s{slide:04d}", f"p{patient_N[slide]:04d}",
                                archive.classes[label_N[slide]], archive.classes[int(share.argmax())], tuple(share),
                                backbone, f"site{site_P[patient_N[slide]]}" if archive.sites else "",
                            )
                        )  # fmt: skip
    return rows


def _logits(archive: Archive, labelled: Sequence[np.ndarray], tested_ND: np.ndarray) -> np.ndarray:
    """(N, classes) of a head that has learnt from `labelled`, the features of each class."""
    if not archive.logistic:
        means = np.stack([x_ND.mean(0) for x_ND in labelled])
        return -((tested_ND[:, None] - means[None]) ** 2).sum(-1) / 4
    labels = np.repeat(np.arange(len(labelled)), [len(x_ND) for x_ND in labelled])
    weight, bias, _ = _logistic(np.concatenate(labelled) / np.sqrt(DIMENSIONS), labels, DEFAULT_STRENGTH)
    return tested_ND / np.sqrt(DIMENSIONS) @ weight.T + bias


def true_balanced_accuracy(archive: Archive, start: str, budget: int) -> float:
    """Of heads trained on new patients, tested on new patients: what the intervals should hold."""
    separation, num_classes = archive.separation[start], len(archive.classes)
    if archive.permuted:
        return 1 / num_classes
    if archive.logistic:
        assert budget <= archive.patients_per_class, "patients of one slide each"
        return _true_logistic(archive.classes, separation, budget)
    if archive.sites:
        assert budget <= 0.5 * archive.patients_per_class, "labels of new patients only"
        trained_on = archive.sites if archive.test_sites else round(archive.sites * (1 - 1 / archive.num_folds))
        return _true_with_sites(
            num_classes, separation, budget, trained_on, archive.site_share, archive.site_spread, archive.unequal_sites
        )
    noise = _noise_of_means(archive, budget)
    if start not in archive.seeds or not archive.seed_spread:
        return _true_accuracy(num_classes, separation, noise)
    places, weights = np.polynomial.hermite_e.hermegauss(7)  # of the normal distribution that runs are drawn from
    found = [_true_accuracy(num_classes, separation + archive.seed_spread * z, noise) for z in places.tolist()]
    return float(np.average(found, weights=weights))


def _noise_of_means(archive: Archive, budget: int) -> float:
    """Variance of the mean of `budget` slides, those of one patient sharing `patient_share` of theirs."""
    patients = archive.patients_per_class
    if not archive.test_patients_per_class:
        patients = round(patients * (1 - 1 / archive.num_folds))
    turns, over = divmod(budget, patients)
    of_patients = (over * (turns + 1) ** 2 + (patients - over) * turns**2) / budget**2
    return archive.patient_share * of_patients + (1 - archive.patient_share) / budget


@functools.cache
def _true_accuracy(num_classes: int, separation: float, noise: float, num_heads: int = 1000) -> float:
    rng = np.random.default_rng(0)
    centres = _centres(num_classes, separation)
    labels = np.repeat(np.arange(num_classes), 120)
    right = 0.0
    for _ in range(num_heads):
        means = centres + rng.standard_normal(centres.shape) * np.sqrt(noise)
        x = centres[labels] + rng.standard_normal((len(labels), DIMENSIONS))
        right += float((((x[:, None] - means[None]) ** 2).sum(-1).argmin(1) == labels).mean())
    return right / num_heads


@functools.cache
def _true_logistic(classes: tuple[str, ...], separation: float, budget: int, num_heads: int = 600) -> float:
    rng = np.random.default_rng(0)
    archive, centres = Archive(classes=classes, logistic=True), _centres(len(classes), separation)
    labels = np.repeat(np.arange(len(classes)), 120)
    right = 0.0
    for _ in range(num_heads):
        labelled = [centre + rng.standard_normal((budget, DIMENSIONS)) for centre in centres]
        x = centres[labels] + rng.standard_normal((len(labels), DIMENSIONS))
        right += float((_logits(archive, labelled, x).argmax(1) == labels).mean())
    return right / num_heads


@functools.cache
def _true_with_sites(
    num_classes: int,
    separation: float,
    budget: int,
    num_sites: int,
    share: float,
    spread: float,
    unequal: bool,
    num_heads: int = 2000,
) -> float:
    rng = np.random.default_rng(0)
    centres = _centres(num_classes, separation)
    labels = np.repeat(np.arange(num_classes), 120)
    right = 0.0
    for _ in range(num_heads):
        site = _sites(num_sites, unequal, num_classes * budget, rng)
        shift = np.sqrt(share) * rng.standard_normal((num_sites, DIMENSIONS))
        own = np.sqrt(1 - share) * rng.standard_normal((len(site), DIMENSIONS))
        focus = 1 + spread * rng.standard_normal(num_sites)
        labelled = np.repeat(centres, budget, 0) * focus[site, None] + shift[site] + own
        means = labelled.reshape(num_classes, budget, DIMENSIONS).mean(1)
        x = centres[labels] * (1 + spread * rng.standard_normal((len(labels), 1))) + rng.standard_normal(
            (len(labels), DIMENSIONS)
        )
        right += float((((x[:, None] - means[None]) ** 2).sum(-1).argmin(1) == labels).mean())
    return right / num_heads


def _centres(num_classes: int, separation: float) -> np.ndarray:
    centres = np.zeros((num_classes, DIMENSIONS))
    centres[np.arange(num_classes), np.arange(num_classes)] = separation
    return centres


def _features(
    archive: Archive, rng: np.random.Generator, label_P: np.ndarray, patient_N: np.ndarray, site_P: np.ndarray
) -> dict[str, np.ndarray]:
    def noise(common: np.ndarray) -> np.ndarray:
        own = rng.standard_normal(common.shape)
        return np.sqrt(archive.shared) * common + np.sqrt(1 - archive.shared) * own

    of_patient = rng.standard_normal((len(label_P), DIMENSIONS))
    of_slide = rng.standard_normal((len(patient_N), DIMENSIONS))
    of_site = rng.standard_normal((archive.sites + archive.test_sites, DIMENSIONS)) if archive.sites else None
    focus = 1 + archive.site_spread * rng.standard_normal((len(of_site), 1)) if of_site is not None else np.ones((1, 1))
    separations = {}
    for start, separation in archive.separation.items():
        for number in range(archive.seeds.get(start, 0)):
            separations[f"{start}+s{number}"] = separation + archive.seed_spread * rng.standard_normal()
        if start not in archive.seeds:
            separations[start] = separation
    return {
        key: _centres(len(archive.classes), separation)[label_P[patient_N]] * focus[site_P[patient_N]]
        + np.sqrt(archive.patient_share) * noise(of_patient)[patient_N]
        + np.sqrt(1 - archive.patient_share - archive.site_share) * noise(of_slide)
        + (0 if of_site is None else np.sqrt(archive.site_share) * noise(of_site)[site_P[patient_N]])
        for key, separation in separations.items()
    }


def _sites(num_sites: int, unequal: bool, num_patients: int, rng: np.random.Generator) -> np.ndarray:
    """Each patient's site, at random: sites differ in how many they send of each class."""
    if not num_sites:
        return np.zeros(num_patients, dtype=int)
    sizes = np.arange(1, num_sites + 1) if unequal else np.ones(num_sites)
    return rng.choice(num_sites, num_patients, p=sizes / sizes.sum())


def _folds(
    label_P: np.ndarray, num_folds: int, rng: np.random.Generator, site_P: np.ndarray | None = None
) -> np.ndarray:
    fold_P = np.empty(len(label_P), dtype=int)
    if site_P is not None:
        for fold, (_, test) in enumerate(_k_fold(label_P, site_P, num_folds, int(rng.integers(2**31)), 0)):
            fold_P[test] = fold
        return fold_P
    dealt = 0
    for number in np.unique(label_P):
        members = rng.permutation(np.flatnonzero(label_P == number))
        fold_P[members] = (np.arange(len(members)) + dealt) % num_folds
        dealt += len(members)
    return fold_P


def _order(patients: np.ndarray, slides_per_patient: int, rng: np.random.Generator) -> np.ndarray:
    """One slide of each patient before a second of any."""
    shuffled = rng.permutation(patients)
    if slides_per_patient == 1:
        return shuffled
    own_PT = rng.permuted(np.tile(np.arange(slides_per_patient), (len(patients), 1)), axis=1)
    return (shuffled[:, None] * slides_per_patient + own_PT).T.reshape(-1)


# ---- a finetuning's directory


def write_finetuning(
    workspace: Workspace,
    name: str = "default",
    archive: Archive | None = None,
    seed: int = 0,
    classes: Sequence[str] = ("normal", "adenoma", "carcinoma"),
    **facts: object,
) -> FinetuneDir:
    """What `histossl finetune` leaves, with a pretraining run and a ledger beside it."""
    archive = archive or Archive(
        patients_per_class=11,
        classes=tuple(classes),
        separation={"random": 0.5, "imagenet": 1.4, "adapted": 2.3, "colour": 0.9},
        budgets=(1, 2, 4, "all"),
        num_draws=4,
    )
    run = workspace.finetune(name)
    run.root.mkdir(parents=True, exist_ok=True)
    predictions = predictions_of(archive, np.random.default_rng(seed))
    write_predictions(run.predictions, predictions, archive.classes)
    pretrain = workspace.pretrain("default")
    pretrain.root.mkdir(parents=True, exist_ok=True)
    steps = np.arange(10, 1010, 10)
    rng = np.random.default_rng(0)
    with pretrain.log.open("w") as log:
        for step in steps:
            row = {
                "step": int(step), "loss": 5 + 3 * np.exp(-step / 200) + 0.1 * rng.standard_normal(),
                "lr": 1e-4 * (1 - step / 1000), "instance_accuracy": 0.9 - 0.8 * np.exp(-step / 300),
                "loss_ceiling": 8.3, "tiles_per_s": 410.0 + rng.standard_normal(), "data_wait": 0.01,
                "grad_norm": 2 + rng.standard_normal() ** 2,
            }  # fmt: skip
            log.write(json.dumps(row) + "\n")
            if step % 100 == 0:
                look = {"step": int(step), "feature_std": 0.98 - step / 1e4, "effective_rank": 140 - step / 40}
                log.write(json.dumps(look) + "\n")
    pretrain.run_json.write_text(
        json.dumps({"config": {"method": "mocov2", "steps": 1000}, "command": ["/usr/bin/histossl", "pretrain"]})
    )
    (workspace.root / "archive.csv").write_text(
        "file,status,reason,slide,num_tiles,tile_status,tile_reason\n"
        "s0000.tif,ok,,s0000,420,tiled,\n"
        "s0001.tif,warning,no microns per pixel; taken as 0.5,s0001,380,tiled,\n"
        "broken.svs,unreadable,not a slide file that OpenSlide or tifffile knows,,,,\n"
        "blank.tif,ok,,blank,0,no tiles,no tissue found\n"
    )
    num_slides = len({one.slide for one in predictions})
    run.run_json.write_text(
        json.dumps(
            {
                "config": {"labels": "labels.csv", "head": "mean", "draws": archive.num_draws, "seed": 0},
                "command": ["/usr/bin/histossl", "finetune", "--labels", "labels.csv"],
                "histossl": "0.1.0",
                "versions": {"torch": "2.10", "timm": "1.0"},
                "python": "3.11.2",
                "platform": "Linux",
                "classes": list(archive.classes),
                "unit": "slide",
                "split": {"group": "patient", "num_folds": archive.num_folds, "notes": []},
                "labels": {
                    "missing": [["C-9", "nearest: C-8"]],
                    "notes": [],
                    "table": {
                        "columns": ["class", "slides", "patients"],
                        "rows": [[label, num_slides // len(archive.classes), 11] for label in archive.classes],
                    },
                },
                "leak": {
                    "statement": "adapted: none of the tested slides was in its pretraining pool",
                    "seen": {"adapted": 0},
                },
                "starts": {
                    start: {
                        "timm_name": "" if start == "colour" else "resnet50",
                        "feature_dim": 27 if start == "colour" else 2048,
                        "input_px": 224,
                        "source": str(pretrain.backbone) if start == "adapted" else start,
                    }
                    for start in archive.separation
                },
                **facts,
            }
        )
    )
    return run


def write_tiles_and_embeddings(workspace: Workspace, run: FinetuneDir, tiles_per_slide: int = 8) -> None:
    """Tiles that tell slide and number by their colour, and features that tell the class: half of them for imagenet,
    nearly all for adapted."""
    predictions, classes = read_predictions(run.predictions)
    label_of = {one.slide: one.label for one in predictions}
    slides = sorted(label_of)
    write_synthetic_store(workspace, slides, tiles_per_slide)
    facts = json.loads(run.run_json.read_text())
    rng = np.random.default_rng(0)
    for start, strength in (("imagenet", 0.5), ("adapted", 4.0)):
        folder = workspace.embeddings(f"{start}-0123-64px")
        folder.mkdir(parents=True)
        for slide in slides:
            features = rng.standard_normal((tiles_per_slide, 8))
            features[:, classes.index(label_of[slide])] += strength
            with h5py.File(folder / f"{slide}.h5", "w") as file:
                file["features"] = features.astype(np.float32)
                file["coords"] = np.zeros((tiles_per_slide, 2), dtype=np.int64)
        facts["starts"][start]["embeddings"] = folder.name
    run.run_json.write_text(json.dumps(facts))
