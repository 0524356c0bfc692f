"""Tests of tuner.search.samplers."""

from typing import get_args

import pytest
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler

from tuner.search.samplers import SAMPLERS, derive_seed, make_sampler
from tuner.spec.sections import SearchSection


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tpe", TPESampler),
        ("gp", GPSampler),
        ("random", RandomSampler),
        ("qmc", QMCSampler),
        ("grid", RandomSampler),
    ],
)
def test_make_sampler_makes_each_kind_without_a_warning(name: str, kind: type[BaseSampler]) -> None:
    """Every name of the study file has its sampler; experimental and deprecated arguments would warn."""
    assert isinstance(make_sampler(name, study_seed=0, n_stored=0), kind)


def test_samplers_are_those_of_the_study_file() -> None:
    """The registry and the spec name the same samplers."""
    assert sorted(SAMPLERS) == sorted(get_args(SearchSection.model_fields["sampler"].annotation))


def test_derive_seed_is_pinned() -> None:
    """Seeds are the same in every process, on every machine, for ever: stored studies depend on them."""
    assert derive_seed(0, 0) == 3148273492
    assert derive_seed(0, "trial", 3, bits=63) == 9149890335528421621


def test_derive_seed_tells_its_parts_apart() -> None:
    """Neighbouring seeds and numbers give different seeds, within the bits asked for."""
    seeds = {derive_seed(study, number) for study in range(30) for number in range(30)}
    assert len(seeds) == 900
    assert max(seeds) < 2**32
    assert derive_seed(1, 12) != derive_seed(11, 2)
