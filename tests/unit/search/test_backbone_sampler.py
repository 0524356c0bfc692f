"""Tests of tuner.search.backbone_sampler."""

import math
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import HyperbandPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import TrialState as OptunaState

from tuner.search.backbone_sampler import PerBackboneSampler, make_screened_sampler
from tuner.search.samplers import SAMPLERS

SPACE = {
    "backbone": CategoricalDistribution(("a", "b")),
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
    "layers": IntDistribution(1, 4),
}


class Watching(TPESampler):
    """A sampler that keeps what it saw of the study it was asked for."""

    def __init__(self) -> None:
        super().__init__(n_startup_trials=0, seed=0)
        self.seen: list[list[tuple[str, dict[str, Any], dict[str, float]]]] = []

    def sample_relative(self, study: optuna.Study, trial: Any, search_space: Any) -> dict[str, Any]:
        """Note the study's trials, without the one that is asked for."""
        trials = [each for each in study.get_trials(deepcopy=False) if each.number != trial.number]
        self.seen.append([(each.state.name, each.params, each.constraints) for each in trials])
        return super().sample_relative(study, trial, search_space)


def make_study(sampler: BaseSampler, *, n_each: int = 6, pruner: Any = None) -> optuna.Study:
    """Return a study with finished trials of both backbones: "a" at rates below 1e-3, "b" above."""
    study = optuna.create_study(study_name="small", direction="maximize", sampler=sampler, pruner=pruner)
    for number in range(2 * n_each):
        name = "ab"[number % 2]
        rate = 10 ** (-5 + 0.3 * (number // 2) if name == "a" else -1 - 0.3 * (number // 2))
        study.enqueue_trial({"backbone": name, "lr": rate, "layers": 1})
        trial = study.ask(SPACE)
        trial.report(0.5, step=1)
        trial.should_prune()  # from here on Hyperband has its brackets
        study.tell(trial, 0.5 + 0.01 * number)
    return study


def make_watched(n_startup_trials: int = 10) -> tuple[PerBackboneSampler, Watching]:
    """Return a sampler and what watches its second half."""
    watching = Watching()
    return PerBackboneSampler(TPESampler(n_startup_trials=n_startup_trials, seed=0), watching), watching


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_make_screened_sampler_makes_each_kind_without_a_warning(name: str) -> None:
    """Only tpe is changed; deprecated and experimental arguments would warn."""
    sampler = make_screened_sampler(name, study_seed=0, n_stored=0)
    assert isinstance(sampler, PerBackboneSampler) is (name == "tpe")


def test_sampler_settles_a_backbone_by_its_own_trials() -> None:
    """What is modelled for the other params are the trials of the backbone that was chosen, without its name."""
    sampler, watching = make_watched()
    study = make_study(sampler)
    watching.seen.clear()
    trial = study.ask(SPACE)
    own = [each.params for each in study.trials[:12] if each.params["backbone"] == trial.params["backbone"]]
    rest = [{name: params[name] for name in ("lr", "layers")} for params in own]
    assert watching.seen == [[("COMPLETE", params, {}) for params in rest]]
    assert all(SPACE[name]._contains(SPACE[name].to_internal_repr(value)) for name, value in trial.params.items())


def test_sampler_tells_of_running_and_infeasible_trials() -> None:
    """Points that train right now, and those that cannot be trained, keep later ones away, as in TPE itself."""
    sampler, watching = make_watched()
    study = make_study(sampler)
    for name in "ab":
        study.enqueue_trial({"backbone": name, "lr": 1e-3, "layers": 2})
        infeasible = study.ask(SPACE)
        study._storage.set_trial_system_attr(infeasible._trial_id, "constraints", [1.0])
        study.tell(infeasible, state=OptunaState.PRUNED)
        study.enqueue_trial({"backbone": name, "lr": 1e-4, "layers": 3})
        study.ask(SPACE)
    watching.seen.clear()
    study.ask(SPACE)
    assert watching.seen[0][-2:] == [
        ("PRUNED", {"lr": 1e-3, "layers": 2}, {"0": 1.0}),
        ("RUNNING", {"lr": 1e-4, "layers": 3}, {}),
    ]


def test_sampler_sees_every_bracket_of_hyperband() -> None:
    """Hyperband shows a sampler the trials of one bracket; a backbone's own are few enough as a whole."""
    sampler, watching = make_watched()
    pruner = HyperbandPruner(min_resource=1, max_resource=27, reduction_factor=3)
    study = make_study(sampler, pruner=pruner)
    watching.seen.clear()
    study.ask(SPACE)
    assert len(watching.seen[0]) == 6


@pytest.mark.parametrize(("n_each", "is_modelled"), [(3, False), (4, True)])
def test_sampler_waits_for_some_trials_of_a_backbone(n_each: int, is_modelled: bool) -> None:
    """With fewer than four of its own a backbone's point is the one that all trials suggest."""
    sampler, watching = make_watched(n_startup_trials=0)
    study = make_study(sampler, n_each=n_each)
    watching.seen.clear()
    assert set(study.ask(SPACE).params) == set(SPACE)
    assert bool(watching.seen) is is_modelled


@pytest.mark.parametrize("names", [("backbone",), ("lr", "layers")])
def test_sampler_leaves_other_spaces_alone(names: tuple[str, ...]) -> None:
    """Where there is one backbone, or nothing but backbones, all trials are the backbone's own or say all there is."""
    sampler, watching = make_watched()
    study = optuna.create_study(sampler=sampler)
    space = {name: SPACE[name] for name in names}
    for _ in range(15):
        study.tell(study.ask(space), 0.5)
    assert watching.seen == []


def test_sampler_is_the_same_for_the_same_seed() -> None:
    """Two searches of one seed ask for the same points; a resumed one for others."""
    points = []
    for n_stored in (0, 0, 7):
        study = make_study(make_screened_sampler("tpe", study_seed=5, n_stored=n_stored))
        points.append([study.ask(SPACE).params for _ in range(4)])
    assert points[0] == points[1]
    assert points[0] != points[2]
    assert all(math.isfinite(point["lr"]) for point in points[0])
