"""A directory is one run's: what differs now is told so that a person can see where it comes from."""

from dataclasses import replace

import pytest

from histossl.core.config import FinetuneConfig, PretrainConfig, refuse_other_config, write_run
from histossl.core.errors import MismatchError


def told(tmp_path, before, now) -> str:
    write_run(tmp_path / "run.json", before)
    with pytest.raises(MismatchError) as caught:
        refuse_other_config(tmp_path / "run.json", now)
    return str(caught.value)


def test_slides_that_came_or_went_are_named_with_where_they_come_from(tmp_path):
    before = PretrainConfig(excluded_slides=tuple(f"s{number:02d}" for number in range(14)))
    now = replace(before, excluded_slides=(*before.excluded_slides[1:], "V-2a", "V-2b", "V-2c"))
    assert (
        "excluded_slides was 14 entries, now 16 entries (new: V-2a, V-2b, V-2c; gone: s00), "
        "which come from the test patients of --labels and from --exclude"
    ) in told(tmp_path, before, now)


def test_of_many_five_are_named(tmp_path):
    now = PretrainConfig(excluded_slides=tuple(f"s{number}" for number in range(1, 9)))
    said = told(tmp_path, PretrainConfig(), now)
    assert "was [], now 8 entries (new: s1, s2, s3, s4, s5 and 3 more), which come from" in said


def test_a_short_list_is_told_as_it_is(tmp_path):
    said = told(tmp_path, PretrainConfig(excluded_slides=("A",)), PretrainConfig(excluded_slides=("B",)))
    assert "excluded_slides was ['A'], now ['B'], which come from the test patients" in said


def test_a_list_in_another_order_says_so(tmp_path):
    said = told(
        tmp_path, FinetuneConfig(labels="x", starts=tuple("abcd")), FinetuneConfig(labels="x", starts=tuple("acbd"))
    )
    assert "starts was 4 entries, now 4 entries (in another order)" in said
