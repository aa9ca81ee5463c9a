"""The site check warns when a shortcut pays, and only then."""

import numpy as np
import pytest

from histossl.evaluation.site_confounding import _majority, check_site, warn_of_sites
from histossl.labels.label_table import Item, LabelTable


def archive(label_of_site: float, site_in_features: float, seed: int = 0, sites: int = 3, patients: int = 45):
    """Patients with two slides; a site gives its own label with probability `label_of_site`, else any."""
    rng = np.random.default_rng(seed)
    marks = rng.normal(size=(sites, 20)) * site_in_features
    items, rows = [], []
    for patient in range(patients):
        site = patient % sites
        label = site if rng.random() < label_of_site else int(rng.integers(sites))
        for slide in range(2):
            name = f"p{patient}s{slide}"
            items.append(Item(name, name, f"c{label}", f"P{patient}", f"site{site}"))
            rows.append(marks[site] + rng.normal(size=20))
    return np.array(rows), LabelTable(tuple(items), tuple(f"c{n}" for n in range(sites)))


def test_site_in_features_and_label_by_site_is_a_warning():
    found = check_site(*archive(0.9, 1.5))
    assert found.entangled
    assert found.site_from_features > 0.9
    assert found.label_from_site > 0.7
    assert abs(found.site_chance - 1 / 3) < 0.1
    assert "--group site" in found.statement


def test_either_alone_is_not():
    assert not check_site(*archive(0.0, 1.5)).entangled
    assert not check_site(*archive(0.9, 0.0)).entangled
    assert check_site(*archive(0.0, 1.5)).statement == ""


def test_a_site_that_gives_the_label_away_is_told_whatever_features_show():
    found = check_site(*archive(1.0, 0.0))
    assert not found.entangled
    assert found.label_from_site == 1.0
    assert "The site alone tells the label with a balanced accuracy of 1.00" in found.statement


def test_without_entanglement_the_check_rarely_cries_wolf():
    alarms = sum(check_site(*archive(0.0, 0.0, seed)).entangled for seed in range(20))
    assert alarms <= 1


def test_too_few_sites_or_patients_say_nothing():
    pooled, table = archive(0.5, 1.0, patients=6)
    assert check_site(pooled, table) is None
    pooled, table = archive(0.5, 1.0, sites=1)
    assert check_site(pooled, table) is None


def test_the_warning_needs_no_features_and_says_the_same():
    for label_of_site in (0.0, 1.0):
        pooled, table = archive(label_of_site, 1.0)
        found = check_site(pooled, table)
        told = warn_of_sites(table)
        assert bool(told) == found.confounded
        assert f"balanced accuracy of {found.label_from_site:.2f} (chance {found.label_chance:.2f})" in told or not told
    assert warn_of_sites(archive(1.0, 1.0, sites=1)[1]) == ""


@pytest.mark.parametrize("seed", range(5))
def test_a_patients_site_tells_its_label_from_other_patients_only(seed):
    """Held to the definition, row by row: the most frequent label of the site's other patients, classes alike."""
    rng = np.random.default_rng(seed)
    site, patients, label = (rng.integers(high, size=40) for high in (4, 25, 3))
    weight = 1 / np.bincount(label, minlength=3)
    told = []
    for row in range(40):
        others = (site == site[row]) & (patients != patients[row])
        told.append((np.bincount(label[others], minlength=3) * weight).argmax())
    assert _majority(site, label, patients).tolist() == told


def mixed_patients(common: str):
    """At one site patients have a common class and tumour, at the other the common one and adenoma."""
    items = []
    for patient in range(30):
        site, own = ("K", "tumour") if patient < 15 else ("L", "adenoma")
        items += [Item(f"p{patient}{label}", f"s{patient}", label, f"P{patient}", site) for label in (common, own)]
    return LabelTable(tuple(items), tuple(sorted({item.label for item in items})))


@pytest.mark.parametrize("common", ["normal", "aaa", "zzz"])
def test_patients_of_several_classes_are_judged_alike_whatever_their_classes_are_called(common):
    table = mixed_patients(common)
    found = check_site(np.random.default_rng(0).normal(size=(60, 5)), table)
    assert found.label_from_site == pytest.approx(2 / 3)
    assert found.label_chance < 0.4
    assert found.confounded
