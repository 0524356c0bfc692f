"""Tests of tuner.search.screening."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from tuner.search.distributions import make_distributions
from tuner.search.screening import (
    DEEPER_ATTR,
    Agreement,
    QueuedPoint,
    choose_deeper,
    describe_agreement,
    find_missing,
    is_counted,
    is_screen,
    list_screen_points,
    measure_agreement,
    rank_backbones,
)
from tuner.search.trial_attrs import SCREEN_ATTR
from tuner.spec.sections import StudySpec
from tuner.trial import Reason

from .builders import GROUP_COUNTS, make_spec

BACKBONE = {"choices": ["test_resnet", "test_vit"]}
SPACE: dict[str, Any] = {
    "backbone": BACKBONE,
    "lr": {"low": 1e-5, "high": 1e-1, "log": True},
    "batch_size": {"choices": [16, 32, 64]},
    "unfrozen_layers": {"low": 1, "high": "all"},
    "augmentation_strength": {"low": 0.25, "high": 1.0, "step": 0.25},
    "dropout": {"low": 0.0, "high": 0.5},
}
MAXIMIZE, MINIMIZE = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE


def make_screened(
    space: dict[str, Any] | None = None, *, screen: int = 8, seed: int = 0, **sections: Any
) -> tuple[StudySpec, dict[str, BaseDistribution]]:
    """Return a spec with a screen, and its distributions."""
    spec = make_spec(
        SPACE if space is None else space,
        study={"name": "small", "seed": seed},
        search={"screen": screen, "sampler": "tpe"},
        **sections,
    )
    return spec, make_distributions(spec, dict.fromkeys(spec.backbone_names(), 6) | GROUP_COUNTS)


def list_points(space: dict[str, Any] | None = None, **overrides: Any) -> list[dict[str, Any]]:
    """Return the screen's points."""
    return [queued.point for queued in list_screen_points(*make_screened(space, **overrides))]


def make_trial(
    backbone: str,
    value: float | None = None,
    *,
    layers: int = 1,
    state: OptunaState = OptunaState.COMPLETE,
    **overrides: Any,
) -> FrozenTrial:
    """Return a trial as the study holds it; of the screen unless deeper layers are unfrozen."""
    values = {"lr": 1e-2, "number": 0, "screen": layers == 1} | overrides
    _, distributions = make_screened({**SPACE, "backbone": {"choices": list("abcdef")}})
    params = {
        "backbone": backbone,
        "lr": values["lr"],
        "batch_size": 16,
        "unfrozen_layers": min(layers, 4),
        "augmentation_strength": 0.25,
        "dropout": 0.1,
    }
    attrs: dict[str, Any] = {"unfrozen_layers_resolved": layers}
    if values["screen"]:
        attrs[SCREEN_ATTR] = {"backbone": backbone, "number": values["number"]}
    return create_trial(
        state=state,
        value=0.5 if value is None and state == OptunaState.COMPLETE else value,
        params=params,
        distributions=distributions,
        user_attrs=attrs,
    )


# --- the points ---


@pytest.mark.parametrize("screen", [1, 5, 8, 20])
def test_list_screen_points_gives_each_backbone_its_number(screen: int) -> None:
    """N different configurations of each backbone, numbered from 0 in its attribute."""
    queued = list_screen_points(*make_screened(screen=screen))
    for name in BACKBONE["choices"]:
        own = [each for each in queued if each.point["backbone"] == name]
        assert [each.attrs for each in own] == [{SCREEN_ATTR: {"backbone": name, "number": n}} for n in range(screen)]
        assert len({each.point["lr"] for each in own}) == screen


def test_list_screen_points_trains_heads_at_the_least_augmentation() -> None:
    """Every point lies in the space, with the head alone and the lowest strength, whatever the rest is."""
    spec, distributions = make_screened()
    for queued in list_screen_points(spec, distributions):
        assert list(queued.point) == list(distributions)
        assert queued.point["unfrozen_layers"] == 1
        assert queued.point["augmentation_strength"] == 0.25
        for name, value in queued.point.items():
            assert distributions[name]._contains(distributions[name].to_internal_repr(value))


def test_list_screen_points_takes_the_least_choice() -> None:
    """A strength of choices has a lowest one too, in whatever order they are written."""
    points = list_points({**SPACE, "augmentation_strength": {"choices": [0.5, 0.1, 1.0]}})
    assert {point["augmentation_strength"] for point in points} == {0.1}


def test_list_screen_points_spreads_over_the_learning_rates() -> None:
    """Eight points of each backbone: two in every decade of four (a Sobol net), whichever the seed."""
    for seed in range(5):
        rates = [point["lr"] for point in list_points(seed=seed) if point["backbone"] == "test_vit"]
        assert all(sum(10.0**low <= rate < 10.0 ** (low + 1) for rate in rates) >= 1 for low in (-5, -4, -3, -2))


def test_list_screen_points_differs_by_backbone_and_seed() -> None:
    """Two backbones, and two studies, try different points."""
    points = [*list_points(), *list_points(seed=1)]
    assert len({point["lr"] for point in points}) == len(points) == 32


def test_list_screen_points_begins_as_a_shorter_list() -> None:
    """Raising ``search.screen`` adds points and moves none."""
    spec, distributions = make_screened(screen=20)
    longer = [each for each in list_screen_points(spec, distributions) if each.attrs[SCREEN_ATTR]["number"] < 5]
    assert longer == list_screen_points(*make_screened(screen=5))


def test_list_screen_points_is_the_same_in_every_process() -> None:
    """A resumed study, with another hash seed, finds the same list."""
    code = (
        "from tests.unit.search.test_screening import list_points\n"
        "print([sorted(point.items()) for point in list_points()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=Path(__file__).parents[3],
        env={"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.strip() == str([sorted(point.items()) for point in list_points()])


def test_list_screen_points_tries_a_small_space_once() -> None:
    """Where heads differ in three ways only, each backbone has three points, not eight."""
    space = {name: SPACE[name] for name in ("backbone", "batch_size", "unfrozen_layers")}
    points = list_points(space)
    assert sorted((point["backbone"], point["batch_size"]) for point in points) == [
        (name, size) for name in BACKBONE["choices"] for size in (16, 32, 64)
    ]
    assert len(list_points({"backbone": BACKBONE, "unfrozen_layers": SPACE["unfrozen_layers"]})) == 2


def test_list_screen_points_leaves_out_what_is_fixed() -> None:
    """A point holds what is searched and nothing else; the attribute names the backbone all the same."""
    spec, distributions = make_screened(
        {"lr": SPACE["lr"]}, screen=3, training={"backbone": "test_vit", "unfrozen_layers": 1}
    )
    queued = list_screen_points(spec, distributions)
    assert [list(each.point) for each in queued] == [["lr"]] * 3
    assert queued[2].attrs == {SCREEN_ATTR: {"backbone": "test_vit", "number": 2}}


# --- on resume ---


@pytest.mark.parametrize(
    ("state", "n_missing"),
    [
        (OptunaState.COMPLETE, 15),
        (OptunaState.RUNNING, 15),
        (OptunaState.WAITING, 15),
        (OptunaState.PRUNED, 15),
        (OptunaState.FAIL, 16),
    ],
)
def test_find_missing_queues_what_no_trial_stands_for(state: OptunaState, n_missing: int) -> None:
    """What is done, queued, running or cannot be trained is not queued again; what failed without a reason is."""
    queued = list_screen_points(*make_screened())
    attrs = {"params_resolved": {}, **queued[3].attrs}
    trial = create_trial(state=state, value=0.5 if state == OptunaState.COMPLETE else None, user_attrs=attrs)
    missing = find_missing(queued, [trial, make_trial("a", 0.1, screen=False)])
    assert len(missing) == n_missing
    assert (queued[3] in missing) is (state == OptunaState.FAIL)


@pytest.mark.parametrize(
    ("reason", "attempt", "is_missing"),
    [
        (Reason.ERROR, 0, False),
        (Reason.WORKER_LOST, 2, False),
        (Reason.UNREADABLE, 2, False),
        (Reason.WORKER_LOST, 1, True),
        (Reason.INTERRUPTED, 0, True),
        (Reason.INTERRUPTED, 2, True),
    ],
)
def test_find_missing_gives_a_point_up_that_would_fail_again(reason: Reason, attempt: int, *, is_missing: bool) -> None:
    """An error, and the last of three losses, stand: restarts do not try the point for ever; a kill is no failure."""
    queued = list_screen_points(*make_screened(screen=1))
    attrs = {**queued[0].attrs, "reason": reason.value, "attempt": attempt}
    missing = find_missing(queued, [create_trial(state=OptunaState.FAIL, user_attrs=attrs)])
    assert (queued[0] in missing) is is_missing


def test_find_missing_takes_a_retry_for_the_lost_trial() -> None:
    """A trial that failed and was queued again with its attributes is not missing."""
    queued = list_screen_points(*make_screened(screen=1))
    trials = [
        create_trial(state=OptunaState.FAIL, user_attrs=queued[0].attrs),
        create_trial(state=OptunaState.WAITING, user_attrs={**queued[0].attrs, "retry_of": 0}),
    ]
    assert find_missing(queued, trials) == queued[1:]


def test_screen_trials_count_apart() -> None:
    """COMPLETE and PRUNED trials count, unless they are the screen's."""
    counted = {
        (state.name, screen): is_counted(make_trial("a", state=state, screen=screen))
        for state in OptunaState
        for screen in (True, False)
    }
    assert [key for key, value in counted.items() if value] == [("COMPLETE", False), ("PRUNED", False)]


# --- ranks ---

CROSSING = [
    make_trial("a", 0.70, lr=1e-3),
    make_trial("a", 0.60, lr=1e-1),
    make_trial("b", 0.40, lr=1e-3),
    make_trial("b", 0.90, lr=1e-1),
    make_trial("c", 0.65, lr=1e-3),
    make_trial("c", 0.10, lr=1e-1),
]


def test_rank_backbones_takes_each_at_its_own_best_rate() -> None:
    """At 1e-3 the order would be a, c, b; at its own rate b is the best."""
    ranked = rank_backbones(CROSSING, MAXIMIZE)
    assert [(name, trial.value, trial.params["lr"]) for name, trial in ranked.items()] == [
        ("b", 0.90, 1e-1),
        ("a", 0.70, 1e-3),
        ("c", 0.65, 1e-3),
    ]


def test_rank_backbones_follows_the_direction() -> None:
    """Of a loss the lowest is the best."""
    ranked = rank_backbones(CROSSING, MINIMIZE)
    assert [(name, trial.value) for name, trial in ranked.items()] == [("c", 0.10), ("b", 0.40), ("a", 0.60)]


def test_rank_backbones_looks_at_completed_screen_trials_only() -> None:
    """Neither a pruned head nor the search's own trials move the screen's order."""
    others = [
        make_trial("a", 0.99, screen=False),
        make_trial("a", 0.99, state=OptunaState.PRUNED),
        make_trial("d", 0.99, layers=3),
    ]
    assert list(rank_backbones([*CROSSING, *others], MAXIMIZE)) == ["b", "a", "c"]


# --- what the search starts with ---


def deepen(trials: list[FrozenTrial], space: dict[str, Any] | None = None, **sections: Any) -> list[QueuedPoint]:
    """Return the points that follow a screen of up to six backbones."""
    searched = {**SPACE, "backbone": {"choices": list("abcdef")}} if space is None else space
    return choose_deeper(trials, MAXIMIZE, *make_screened(searched, **sections))


@pytest.mark.parametrize(("n_backbones", "n_kept"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3), (6, 3)])
def test_choose_deeper_keeps_three_backbones(n_backbones: int, n_kept: int) -> None:
    """A head's rank dismisses no backbone while fewer than three go on."""
    trials = [make_trial(name, 0.5 + place / 10) for place, name in enumerate("abcdef"[:n_backbones])]
    kept = [queued.point["backbone"] for queued in deepen(trials)]
    best_first = list(reversed("abcdef"[:n_backbones]))
    assert kept == [best_first[0], *best_first[:n_kept]]


def test_choose_deeper_keeps_half_of_many_backbones() -> None:
    """Of eight backbones four go on."""
    names = list("abcdefgh")
    space = {**SPACE, "backbone": {"choices": names}}
    spec, distributions = make_screened(space)
    trials = [
        create_trial(value=0.1 * place, params=each.point, distributions=distributions, user_attrs=each.attrs)
        for place, each in enumerate(list_screen_points(spec, distributions)[:8])
    ]
    points = choose_deeper(trials, MAXIMIZE, spec, distributions)
    assert [each.point["backbone"] for each in points] == ["h", "h", "g", "f", "e"]


def test_choose_deeper_unfreezes_the_middle_and_for_the_best_all() -> None:
    """Levels 1 to 4: each goes on at 3, the best one at 4 too; the rest of its best recipe stays."""
    points = deepen(CROSSING)
    assert [(each.point["backbone"], each.point["unfrozen_layers"]) for each in points] == [
        ("b", 3),
        ("b", 4),
        ("a", 3),
        ("c", 3),
    ]
    best = rank_backbones(CROSSING, MAXIMIZE)["b"].params
    assert [name for name in best if points[0].point[name] != best[name]] == ["lr", "unfrozen_layers"]
    assert points[1].attrs == {DEEPER_ATTR: {"backbone": "b", "unfrozen_layers": 4}}


def test_choose_deeper_takes_levels_from_choices() -> None:
    """Of the choices 1, 6 and 2 the deeper ones are 2 and 6."""
    space = {**SPACE, "backbone": {"choices": list("abcdef")}, "unfrozen_layers": {"choices": [1, 6, 2]}}
    assert [each.point["unfrozen_layers"] for each in deepen([make_trial("a", 0.5)], space)] == [2, 6]


@pytest.mark.parametrize(
    ("head_lr", "optimizer", "expected"),
    [
        (1e-1, "adamw", 1e-3),
        (1e-2, "adamw", 3e-4),
        (1e-4, "adamw", 1e-4),
        (1e-1, "sgd", 1e-2),
        (1e-3, "sgd", 1e-3),
    ],
)
def test_choose_deeper_lowers_a_heads_rate(head_lr: float, optimizer: str, expected: float) -> None:
    """A hundredth of the head's rate, at least what suits full fine-tuning, never more than the head's own."""
    points = deepen([make_trial("a", 0.5, lr=head_lr)], training={"epochs": 3, "optimizer": optimizer})
    assert [each.point["lr"] for each in points] == [pytest.approx(expected)] * 2


def test_choose_deeper_stays_inside_the_space() -> None:
    """A space of high rates bounds what deeper training gets; a fixed rate stays fixed."""
    space = {**SPACE, "backbone": {"choices": list("abcdef")}, "lr": {"low": 5e-3, "high": 1e-1, "log": True}}
    assert {each.point["lr"] for each in deepen([make_trial("a", 0.5)], space)} == {5e-3}


def test_choose_deeper_has_nothing_where_heads_are_all_there_is() -> None:
    """Without a deeper level, or without a completed head, the search starts by itself."""
    heads = {name: table for name, table in SPACE.items() if name != "unfrozen_layers"}
    heads["backbone"] = {"choices": list("abcdef")}
    assert deepen(CROSSING, heads, training={"unfrozen_layers": 1}) == []
    assert deepen(CROSSING, {**heads, "unfrozen_layers": {"choices": [1]}}) == []
    assert deepen([make_trial("a", state=OptunaState.FAIL)]) == []


def test_choose_deeper_is_queued_once() -> None:
    """After a kill the same points are chosen, and those that are queued are not missing."""
    points = deepen(CROSSING)
    queued = [create_trial(state=OptunaState.WAITING, user_attrs=each.attrs) for each in points[:3]]
    assert find_missing(deepen(CROSSING), [*CROSSING, *queued]) == points[3:]


# --- agreement ---


def make_pairs(*pairs: tuple[float, float]) -> list[FrozenTrial]:
    """Return trials whose backbones have these best values, in the screen and deeper, among worse ones."""
    trials = []
    for name, (head, deeper) in zip("abcdef", pairs, strict=False):
        trials += [make_trial(name, head), make_trial(name, head - 0.3)]
        trials += [make_trial(name, deeper, layers=3), make_trial(name, deeper - 0.3, layers=6)]
    return trials


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (((0.5, 0.6), (0.6, 0.7), (0.7, 0.8)), 1.0),
        (((0.5, 0.8), (0.6, 0.7), (0.7, 0.6)), -1.0),
        # ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15)
        (((0.5, 0.7), (0.6, 0.6), (0.7, 0.9), (0.8, 0.8)), 0.6),
        # ranks 1.5 1.5 3 and 1 2 3: Pearson of the ranks, 1.5 / sqrt(1.5 * 2)
        (((0.5, 0.6), (0.5, 0.7), (0.7, 0.8)), 0.8660254),
    ],
)
def test_measure_agreement_is_spearman_over_backbones(pairs: tuple[tuple[float, float], ...], expected: float) -> None:
    """By hand: each backbone stands once, with its best value of either kind; ties share a rank."""
    agreement = measure_agreement(make_pairs(*pairs), MAXIMIZE)
    assert agreement is not None
    assert agreement.spearman == pytest.approx(expected)
    assert agreement.n_backbones == len(pairs)


def test_measure_agreement_follows_the_direction() -> None:
    """Of a loss the best value is the lowest: here the worse trials of ``make_pairs``."""
    trials = [*make_pairs((0.5, 0.6), (0.6, 0.7), (0.7, 0.8)), make_trial("a", 0.9, layers=2)]
    minimized, maximized = measure_agreement(trials, MINIMIZE), measure_agreement(trials, MAXIMIZE)
    assert minimized is not None
    assert maximized is not None
    assert minimized.spearman == pytest.approx(1.0)
    assert maximized.spearman == pytest.approx(-0.5)


@pytest.mark.parametrize(
    "trials",
    [
        make_pairs((0.5, 0.6), (0.6, 0.7)),
        [*make_pairs((0.5, 0.6), (0.6, 0.7)), make_trial("c", 0.7), make_trial("d", 0.8, layers=2)],
        [*make_pairs((0.5, 0.6), (0.6, 0.7)), make_trial("c", 0.7), make_trial("c", layers=2, state=OptunaState.FAIL)],
        [*make_pairs((0.5, 0.6), (0.6, 0.7)), make_trial("c", 0.7), make_trial("c", 0.8, screen=False)],
        make_pairs((0.5, 0.6), (0.5, 0.7), (0.5, 0.8)),
        make_pairs((0.5, 0.6), (0.6, 0.6), (0.7, 0.6)),
    ],
    ids=["two backbones", "one value each", "failed", "head of the search", "equal heads", "equal deeper"],
)
def test_measure_agreement_says_nothing_of_too_little(trials: list[FrozenTrial]) -> None:
    """Three backbones with both values, told apart by each, are the least; there is no warning either."""
    assert measure_agreement(trials, MAXIMIZE) is None


def test_describe_agreement_is_one_line() -> None:
    """Number of backbones and the correlation with its sign."""
    assert describe_agreement(Agreement(spearman=-0.5, n_backbones=3)) == (
        "screen: the order of 3 backbones by their heads agrees with their order after deeper training "
        "with Spearman's rho = -0.50"
    )


def test_screen_points_are_taken_by_optuna_as_they_are() -> None:
    """Asked through the queue a point comes back unchanged, with its attribute."""
    spec, distributions = make_screened()
    study = optuna.create_study()
    queued = list_screen_points(spec, distributions)[9]
    study.enqueue_trial(queued.point, user_attrs=queued.attrs)
    trial = study.ask(distributions)
    assert trial.params == queued.point
    assert is_screen(study.trials[0])
    assert isinstance(distributions["backbone"], CategoricalDistribution)


def test_list_screen_points_takes_the_backbones_in_turn() -> None:
    """One that is broken must not keep the others from being seen."""
    spec, distributions = make_screened()
    names = [each.point["backbone"] for each in list_screen_points(spec, distributions)]
    n_backbones = len(spec.backbone_names())
    assert names[:n_backbones] == list(spec.backbone_names())
    assert names == names[:n_backbones] * (len(names) // n_backbones)
