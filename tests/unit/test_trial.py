"""Tests of tuner.trial: recipes as they are stored, and the head that a deeper one starts from."""

import json
from dataclasses import asdict, replace

import pytest

from tests.unit.training.builders import make_params
from tuner.trial import HeadStart, TrialParams

HEAD = HeadStart.take_from(make_params(lr=0.1, batch_size=8, unfrozen_layers=1, dropout=0.3, seed=11, epochs=2))
DEEPER = replace(make_params(unfrozen_layers=3, layer_decay=0.5, views=4, view_seed=9), head_start=HEAD)


@pytest.mark.parametrize("params", [make_params(), DEEPER])
def test_params_come_back_from_json(params: TrialParams) -> None:
    """As ``to_json`` wrote them, and as messages do."""
    assert TrialParams.from_json(json.loads(json.dumps(params.to_json()))) == params
    assert TrialParams.from_json(json.loads(json.dumps(asdict(params)))) == params


def test_params_without_a_head_start_are_stored_as_before() -> None:
    """Studies, checkpoints and model folders that know nothing of it hold the same JSON."""
    assert "head_start" not in make_params().to_json()
    assert TrialParams.from_json(make_params().to_json()).head_start is None
    assert make_params().head_recipe is None


@pytest.mark.parametrize("forged", ["screen", {}, {"lr": 0.1}, {**asdict(HEAD), "backbone": "other"}])
def test_params_with_a_forged_head_start_are_refused(forged: object) -> None:
    """Readers turn a TypeError into one line."""
    with pytest.raises(TypeError, match=r"HeadStart|argument after"):
        TrialParams.from_json(make_params().to_json() | {"head_start": forged})


def test_head_recipe_is_the_trial_that_it_was_taken_from() -> None:
    """The head's own values, and of the trial what all trials of a study share; nothing that differs between trials."""
    screened = make_params(
        lr=0.1, batch_size=8, unfrozen_layers=1, dropout=0.3, seed=11, epochs=2, views=4, view_seed=9
    )
    assert DEEPER.head_recipe == screened
    assert replace(DEEPER, lr=5.0, layer_decay=0.9, unfrozen_layers=2, seed=3).head_recipe == screened


def test_with_seed_draws_the_head_afresh_too() -> None:
    """A fresh seed leaves nothing of the search's luck; the trial's own keeps the head that the search gave it."""
    fresh = DEEPER.with_seed(99)
    assert fresh.head_start is not None
    assert (fresh.seed, fresh.head_start.seed) == (99, 99)
    assert replace(fresh, seed=DEEPER.seed, head_start=HEAD) == DEEPER
    assert DEEPER.with_seed(DEEPER.seed) is DEEPER
    assert make_params().with_seed(99) == make_params(seed=99)
