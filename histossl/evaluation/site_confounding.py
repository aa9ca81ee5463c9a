"""Are site and label entangled? Then a head may learn where a slide was stained instead of what is on it.

Two questions, each answered on patients left out: do features tell the site, and does the site tell the label? Only
both together let a shortcut pay. Each answer is a balanced accuracy beside what the same procedure scores on
sites shuffled over patients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histossl.heads.feature_heads import Floats, Ints, SimpleShotHead
from histossl.labels.label_table import LabelTable

Bools = NDArray[np.bool_]
FEWEST_PATIENTS = 3  # per site, to be told from the others
NUM_SHUFFLES = 200
CLEAR = 0.05  # share of shuffles that may do as well


@dataclass(frozen=True)
class SiteCheck:
    """Scores are balanced accuracies; `*_chance` their mean over shuffles, `*_p` the share of shuffles as good."""

    num_sites: int
    site_from_features: float
    site_chance: float
    site_p: float
    label_from_site: float
    label_chance: float
    label_p: float

    @property
    def entangled(self) -> bool:
        return self.site_p < CLEAR and self.label_p < CLEAR

    @property
    def confounded(self) -> bool:
        """Whether the site gives the label away. Then whoever tells the label may be telling the site, whether or not
        the nearest mean, which is asked here and weaker than most heads, tells the site from these features."""
        return self.label_p < CLEAR

    @property
    def statement(self) -> str:
        """For the verdict; empty where there is nothing to warn of."""
        if not self.confounded:
            return ""
        if not self.entangled:
            return (
                f"The site alone tells the label with a balanced accuracy of {self.label_from_site:.2f} (chance "
                f"{self.label_chance:.2f}). Features were not seen to tell the site ({self.site_from_features:.2f}, "
                f"chance {self.site_chance:.2f}), but a head that tells the label may have learnt the site; "
                "only sites with several labels can part the two."
            )
        return (
            f"Site and label are entangled: the site alone tells the label with a balanced accuracy of "
            f"{self.label_from_site:.2f} (chance {self.label_chance:.2f}), and features tell the site with "
            f"{self.site_from_features:.2f} (chance {self.site_chance:.2f}). Heads may have learnt the site; "
            "--group site tests on sites never seen."
        )

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "entangled": self.entangled, "statement": self.statement}


@dataclass(frozen=True)
class _Evidence:
    """A row for what a patient has of one label at one site: tiles and slides of a patient are no more evidence."""

    row_of_item: Ints
    chosen: Bools  # of the rows: those of sites with patients enough
    site: Ints  # of the chosen rows, as are the next two
    label: Ints
    patients: Ints
    num_sites: int


def _evidence(table: LabelTable) -> _Evidence | None:
    """None where fewer than two sites have three patients each, so that nothing can be said."""
    keys = [(item.patient, item.site, item.label) for item in table.items]
    distinct = sorted(set(keys))
    row_of = {key: row for row, key in enumerate(distinct)}
    patients = np.unique([key[0] for key in distinct], return_inverse=True)[1]
    names = np.array([key[1] for key in distinct])
    labels = np.array([table.classes.index(key[2]) for key in distinct], dtype=np.int64)
    per_site = {name: len(np.unique(patients[names == name])) for name in np.unique(names)}
    sites = [name for name, count in per_site.items() if name and count >= FEWEST_PATIENTS]
    if len(sites) < 2:
        return None
    chosen = np.isin(names, sites)
    return _Evidence(
        np.array([row_of[key] for key in keys]),
        chosen,
        np.searchsorted(np.sort(sites), names[chosen]).astype(np.int64),
        labels[chosen],
        np.unique(patients[chosen], return_inverse=True)[1].astype(np.int64),
        len(sites),
    )


def warn_of_sites(table: LabelTable) -> str:
    """Said before a tile is read, since no features are needed to see it: the sites give the labels away. Else ''."""
    evidence = _evidence(table)
    if evidence is None:
        return ""
    real, chance, p = _label_from_site(evidence, 0)
    if p >= CLEAR:
        return ""
    return (
        f"the site alone tells the label with a balanced accuracy of {real:.2f} (chance {chance:.2f}): a head that "
        "tells the label may be telling the site, and only sites with several labels can part the two"
    )


def check_site(pooled: Floats, table: LabelTable, seed: int = 0) -> SiteCheck | None:
    """`pooled` (items, features). None where fewer than two sites have three patients each."""
    evidence = _evidence(table)
    if evidence is None:
        return None
    means = np.zeros((len(evidence.chosen), pooled.shape[1]))
    np.add.at(means, evidence.row_of_item, pooled)
    x = (means / np.bincount(evidence.row_of_item)[:, None])[evidence.chosen]
    rng = np.random.default_rng([seed, 1])
    fold = _folds(evidence.site, evidence.patients, rng)

    def tell(site: Ints) -> float:
        return _balanced(site, _nearest_mean(x, site, fold))

    return SiteCheck(
        evidence.num_sites,
        *_beside_shuffles(tell, evidence, rng),
        *_label_from_site(evidence, seed),
    )


def _label_from_site(evidence: _Evidence, seed: int) -> tuple[float, float, float]:
    def tell(site: Ints) -> float:
        return _balanced(evidence.label, _majority(site, evidence.label, evidence.patients))

    return _beside_shuffles(tell, evidence, np.random.default_rng([seed, 2]))


def _beside_shuffles(
    ask: Callable[[Ints], float], evidence: _Evidence, rng: np.random.Generator
) -> tuple[float, float, float]:
    """(score, its mean over shuffles of the sites, the share of shuffles that score as well).

    Labels stay with their patient: one who has several would lose all but one of them in a shuffle of labels.
    """
    real = ask(evidence.site)
    shuffled = np.array([ask(_over_patients(evidence.site, evidence.patients, rng)) for _ in range(NUM_SHUFFLES)])
    return real, float(shuffled.mean()), float((1 + (shuffled >= real).sum()) / (1 + NUM_SHUFFLES))


def _folds(site: Ints, patients: Ints, rng: np.random.Generator, num_folds: int = 3) -> Ints:
    """A fold per item: patients whole, each site's patients spread evenly."""
    fold = np.zeros(len(site), dtype=np.int64)
    for number in np.unique(site):
        own = rng.permutation(np.unique(patients[site == number]))
        for place, patient in enumerate(own):
            fold[patients == patient] = place % num_folds
    return fold


def _nearest_mean(x: Floats, truth: Ints, fold: Ints) -> Ints:
    predicted = np.zeros_like(truth)
    everything = np.arange(len(x))
    bags = _Rows(x)
    for number in np.unique(fold):
        train, test = everything[fold != number], everything[fold == number]
        fitted = SimpleShotHead().fit(
            bags,
            train,
            truth[train],
            pool=train,
            groups=train,
            num_classes=int(truth.max()) + 1,
            seed=0,
        )
        predicted[test] = fitted.predict_proba(bags, test).argmax(1)
    return predicted


def _majority(site: Ints, label: Ints, patients: Ints) -> Ints:
    """Each item's label guessed from the other patients of its site: the most frequent one, classes weighed alike."""
    num_classes = int(label.max()) + 1
    weight = 1 / np.maximum(np.bincount(label, minlength=num_classes), 1)
    of_site = np.zeros((int(site.max()) + 1, num_classes))
    np.add.at(of_site, (site, label), 1)
    pair = np.unique(np.stack([site, patients]), axis=1, return_inverse=True)[1].ravel()
    of_patient = np.zeros((int(pair.max()) + 1, num_classes))
    np.add.at(of_patient, (pair, label), 1)
    predicted: Ints = ((of_site[site] - of_patient[pair]) * weight).argmax(1)
    return predicted


def _over_patients(site: Ints, patients: Ints, rng: np.random.Generator) -> Ints:
    """The site of each patient (of one seen at several, the first), dealt out anew to whole patients."""
    _, first = np.unique(patients, return_index=True)
    dealt: Ints = rng.permutation(site[first])[patients]
    return dealt


def _balanced(truth: Ints, predicted: Ints) -> float:
    return float(np.mean([(predicted[truth == number] == number).mean() for number in np.unique(truth)]))


class _Rows:
    """Features that are pooled already, as heads take them."""

    def __init__(self, pooled: Floats) -> None:
        self.pooled = pooled

    def tiles(self, item: int) -> Any:
        return self.pooled[item : item + 1].astype(np.float32)
