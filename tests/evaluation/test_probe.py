"""The probe of a run under way: chance where features say nothing, right where they say it, own patients left out."""

import numpy as np
import pytest
import torch

from histossl.evaluation.probe import knn_score


def scored(num_patients: int, tiles: int, told: float, own: float = 0.0, seed: int = 0) -> float:
    """Two classes; features of noise, with the class to the amount `told`, and the patient to the amount `own`."""
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(num_patients), tiles)
    labels = (patients >= num_patients * 2 // 3).astype(np.int64)  # one class has twice the patients
    x = rng.normal(size=(len(patients), 16))
    x[:, 0] += told * (2 * labels - 1)
    x += own * rng.normal(size=(num_patients, 16))[patients]
    return knn_score(torch.from_numpy(x), labels, patients)


@pytest.mark.parametrize(("patients", "tiles"), [(6, 3), (6, 32), (30, 8)])
def test_noise_is_at_chance_however_few_tiles_there_are(patients: int, tiles: int) -> None:
    scores = [scored(patients, tiles, told=0.0, seed=seed) for seed in range(40)]
    assert np.mean(scores) == pytest.approx(0.5, abs=0.1)  # votes of few tiles are coarse


@pytest.mark.parametrize(("patients", "tiles"), [(6, 3), (30, 8)])
def test_features_that_tell_the_class_score_high(patients: int, tiles: int) -> None:
    assert scored(patients, tiles, told=8.0) == 1.0


def test_tiles_that_only_know_their_patient_are_at_chance() -> None:
    scores = [scored(12, 8, told=0.0, own=8.0, seed=seed) for seed in range(40)]
    assert np.mean(scores) == pytest.approx(0.5, abs=0.1)
