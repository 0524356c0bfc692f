"""Tests of tuner.search.distributions."""

import itertools
import math
import re
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from tuner.errors import SpecError
from tuner.search.distributions import (
    check_group_counts,
    count_map_kinds,
    list_grid,
    list_unfrozen,
    make_distributions,
    project_default_recipe,
    resolve_params,
    resolve_unfrozen_layers,
)

from .builders import GROUP_COUNTS, make_spec

BACKBONE = {"backbone": {"choices": ["test_resnet", "test_vit"]}}


def test_make_distributions_keeps_names_and_order() -> None:
    """Optuna sees the keys of the study file, and "all" is the smallest number of layer groups."""
    space = {
        "lr": {"low": 1e-5, "high": 1e-1, "log": True},
        **BACKBONE,
        "batch_size": {"low": 8, "high": 64, "step": 8},
        "unfrozen_layers": {"low": 1, "high": "all"},
        "dropout": {"low": 0.0, "high": 0.3, "step": 0.1},
    }
    assert list(make_distributions(make_spec(space), GROUP_COUNTS).items()) == [
        ("lr", FloatDistribution(1e-5, 1e-1, log=True)),
        ("backbone", CategoricalDistribution(("test_resnet", "test_vit"))),
        ("batch_size", IntDistribution(8, 64, step=8)),
        ("unfrozen_layers", IntDistribution(1, 4)),
        ("dropout", FloatDistribution(0.0, 0.3, step=0.1)),
    ]


def test_make_distributions_cuts_all_to_the_step() -> None:
    """With a step "all" is the highest level that the step reaches."""
    space = {**BACKBONE, "unfrozen_layers": {"low": 1, "high": "all", "step": 2}}
    assert make_distributions(make_spec(space), GROUP_COUNTS)["unfrozen_layers"] == IntDistribution(1, 3, step=2)


@pytest.mark.parametrize("n_levels", [2, 3, 6, 7, 14, 15, 25])
def test_resolve_unfrozen_layers_spreads_levels(n_levels: int) -> None:
    """Levels rise strictly from the head alone to every group, for any number of groups, by the documented formula."""
    for n_groups in range(n_levels, 80):
        counts = [
            resolve_unfrozen_layers(level, n_groups=n_groups, n_levels=n_levels) for level in range(1, n_levels + 1)
        ]
        assert counts[0] == 1
        assert counts[-1] == n_groups
        assert all(before < after for before, after in itertools.pairwise(counts))
        assert counts == [round(1 + k * (n_groups - 1) / (n_levels - 1)) for k in range(n_levels)]


def test_resolve_unfrozen_layers_is_the_level_where_counts_are_equal() -> None:
    """The smallest backbone takes every level as a count."""
    assert [resolve_unfrozen_layers(level, n_groups=7, n_levels=7) for level in range(1, 8)] == list(range(1, 8))


def test_resolve_unfrozen_layers_with_one_level_is_the_head() -> None:
    """A backbone of one group leaves only the head, for all."""
    assert resolve_unfrozen_layers(1, n_groups=9, n_levels=1) == 1


@pytest.mark.parametrize(
    ("space", "more", "where"),
    [
        ({"unfrozen_layers": {"low": 1, "high": 5}}, {}, "space.unfrozen_layers.high"),
        ({"unfrozen_layers": {"low": 5, "high": "all"}}, {}, "space.unfrozen_layers.low"),
        ({"unfrozen_layers": {"choices": [1, 5]}}, {}, "space.unfrozen_layers.choices"),
        ({}, {"training": {"unfrozen_layers": 5}}, "training.unfrozen_layers"),
        (
            {"unfrozen_layers": {"low": 1, "high": "all"}},
            {"enqueue": [{"unfrozen_layers": 1}, {"unfrozen_layers": 5}]},
            "enqueue[2].unfrozen_layers",
        ),
    ],
)
def test_check_group_counts_refuses_more_than_the_smallest(
    space: dict[str, Any], more: dict[str, Any], where: str
) -> None:
    """A plain count must be reachable in every backbone, wherever the study file names it."""
    problem = f"{where}: must not exceed 4, the number of layer groups of test_vit, got 5"
    with pytest.raises(SpecError, match=f"^{re.escape(problem)}") as caught:
        check_group_counts(make_spec({**BACKBONE, **space}, **more), GROUP_COUNTS)
    assert len(caught.value.problems) == 1


def test_check_group_counts_accepts_what_fits() -> None:
    """Counts up to the smallest number of groups pass."""
    check_group_counts(make_spec({**BACKBONE, "unfrozen_layers": {"low": 1, "high": 4}}), GROUP_COUNTS)
    check_group_counts(make_spec(BACKBONE, training={"unfrozen_layers": "all"}), GROUP_COUNTS)


@pytest.mark.parametrize(
    ("space", "training", "point", "expected"),
    [
        ({"unfrozen_layers": {"low": 1, "high": "all"}}, {}, {"backbone": "test_resnet", "unfrozen_layers": 4}, 6),
        ({"unfrozen_layers": {"low": 1, "high": "all"}}, {}, {"backbone": "test_resnet", "unfrozen_layers": 2}, 3),
        ({"unfrozen_layers": {"low": 1, "high": "all"}}, {}, {"backbone": "test_vit", "unfrozen_layers": 2}, 2),
        ({"unfrozen_layers": {"low": 1, "high": 4}}, {}, {"backbone": "test_resnet", "unfrozen_layers": 2}, 2),
        ({"unfrozen_layers": {"choices": [1, 3]}}, {}, {"backbone": "test_resnet", "unfrozen_layers": 3}, 3),
        ({}, {"unfrozen_layers": "all"}, {"backbone": "test_resnet"}, 6),
        ({}, {"unfrozen_layers": 2}, {"backbone": "test_resnet"}, 2),
        ({}, {}, {"backbone": "test_vit"}, 4),
    ],
)
def test_resolve_params_counts_unfrozen_layers(
    space: dict[str, Any], training: dict[str, Any], point: dict[str, Any], expected: int
) -> None:
    """Levels of "all" are spread, plain numbers are counts, and the default is every group."""
    spec = make_spec({**BACKBONE, **space}, training=training)
    assert resolve_params(spec, point, GROUP_COUNTS, seed=1).unfrozen_layers == expected


def test_resolve_params_prefers_the_point_then_training_then_defaults() -> None:
    """A recipe is whole: suggested, fixed and default values, and what [training] says of every trial."""
    spec = make_spec(
        {**BACKBONE, "lr": {"choices": [1, 2]}},
        training={"epochs": 5, "optimizer": "sgd", "horizontal_flip": False, "class_weights": "balanced"},
    )
    params = resolve_params(spec, {"backbone": "test_vit", "lr": 2}, GROUP_COUNTS, seed=7)
    assert (params.lr, params.optimizer, params.batch_size, params.momentum) == (2.0, "sgd", 32, 0.9)
    assert isinstance(params.lr, float)
    assert (params.epochs, params.horizontal_flip, params.class_weights, params.seed) == (5, False, "balanced", 7)


@pytest.mark.parametrize(
    ("space", "training", "expected"),
    [
        (BACKBONE, {}, {"backbone": "test_resnet"}),
        ({"lr": {"low": 1e-5, "high": 1e-1, "log": True}}, {}, {"lr": 3e-4}),
        ({"lr": {"low": 1e-5, "high": 1e-1}}, {"optimizer": "sgd"}, {"lr": 1e-2}),
        ({"lr": {"low": 1e-3, "high": 1e-1}, "optimizer": {"choices": ["sgd"]}}, {}, {"lr": 1e-2, "optimizer": "sgd"}),
        ({"lr": {"low": 1e-3, "high": 1e-1}}, {}, {"lr": 1e-3}),
        ({"lr": {"low": 1e-6, "high": 1e-5}}, {}, {"lr": 1e-5}),
        ({"batch_size": {"choices": [8, 16, 64]}}, {}, {"batch_size": 16}),
        ({"batch_size": {"low": 10, "high": 50, "step": 10}}, {}, {"batch_size": 30}),
        ({"unfrozen_layers": {"low": 1, "high": "all"}}, {}, {"unfrozen_layers": 4}),
        ({"unfrozen_layers": {"choices": [3, 1]}}, {}, {"unfrozen_layers": 3}),
        ({"augmentation_strength": {"low": 0.0, "high": 1.0, "step": 0.1}}, {}, {"augmentation_strength": 0.2}),
        ({"dropout": {"low": 0.1, "high": 0.4, "step": 0.1}}, {}, {"dropout": 0.1}),
        ({"optimizer": {"choices": ["sgd", "adam"]}}, {}, {"optimizer": "sgd"}),
    ],
)
def test_project_default_recipe_takes_the_nearest_point(
    space: dict[str, Any], training: dict[str, Any], expected: dict[str, Any]
) -> None:
    """The default recipe is pulled into ranges, onto steps and to the nearest choice."""
    spec = make_spec({**BACKBONE, **space}, training=training)
    point = project_default_recipe(spec, make_distributions(spec, GROUP_COUNTS))
    assert {name: point[name] for name in expected} == pytest.approx(expected)


def test_project_default_recipe_is_a_point_of_the_space() -> None:
    """Optuna takes the point without a warning, each value unchanged."""
    space = {
        **BACKBONE,
        "lr": {"low": 1e-5, "high": 1e-1, "log": True},
        "batch_size": {"low": 10, "high": 100, "log": True},
        "unfrozen_layers": {"low": 2, "high": "all", "step": 2},
        "augmentation_strength": {"low": 0.0, "high": 0.3, "step": 0.1},
        "weight_decay": {"low": 0.1, "high": 0.7, "step": 0.1},
    }
    spec = make_spec(space)
    distributions = make_distributions(spec, GROUP_COUNTS)
    point = project_default_recipe(spec, distributions)
    study = optuna.create_study()
    study.enqueue_trial(point)
    assert study.ask(distributions).params == point


@pytest.mark.parametrize("low", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("n_steps", [1, 3, 6, 7])
def test_list_grid_lists_points_that_optuna_contains(low: float, n_steps: int) -> None:
    """Sums of decimal steps do not run over the upper bound: 3 * 0.1 is more than 0.3."""
    high = round(low + n_steps * 0.1, 1)
    spec = make_spec({**BACKBONE, "weight_decay": {"low": low, "high": high, "step": 0.1}})
    distributions = make_distributions(spec, GROUP_COUNTS)
    study = optuna.create_study()
    for point in list_grid(distributions, seed=0):
        study.enqueue_trial(point)
        assert study.ask(distributions).params == point


def test_list_grid_lists_each_point_once_in_seeded_order() -> None:
    """The grid is the product of all values; the seed shuffles it, and the same seed in the same way."""
    space = {
        **BACKBONE,
        "batch_size": {"low": 8, "high": 24, "step": 8},
        "unfrozen_layers": {"low": 1, "high": "all"},
        "dropout": {"low": 0.0, "high": 0.2, "step": 0.1},
    }
    distributions = make_distributions(make_spec(space), GROUP_COUNTS)
    points = list_grid(distributions, seed=0)
    assert len({tuple(point.items()) for point in points}) == len(points) == 2 * 3 * 4 * 3
    assert list_grid(distributions, seed=0) == points
    assert list_grid(distributions, seed=1) != points


def test_list_grid_refuses_real_numbers() -> None:
    """A range without a step has no end."""
    with pytest.raises(TypeError, match="not finite"):
        list_grid({"lr": FloatDistribution(0.1, 0.2)}, seed=0)


@pytest.mark.parametrize(
    ("space", "training", "expected"),
    [
        ({"unfrozen_layers": {"low": 1, "high": "all"}}, {}, {"test_resnet": (1, 3, 4, 6), "test_vit": (1, 2, 3, 4)}),
        ({"unfrozen_layers": {"choices": [3, 1]}}, {}, {"test_resnet": (1, 3), "test_vit": (1, 3)}),
        ({}, {"unfrozen_layers": 2}, {"test_resnet": (2,), "test_vit": (2,)}),
        ({}, {}, {"test_resnet": (6,), "test_vit": (4,)}),
    ],
)
def test_list_unfrozen_is_what_recipes_may_have(
    space: dict[str, Any], training: dict[str, Any], expected: dict[str, tuple[int, ...]]
) -> None:
    """Of each backbone, whatever level it is called."""
    assert list_unfrozen(make_spec({**BACKBONE, **space}, training=training), GROUP_COUNTS) == expected


@pytest.mark.parametrize(
    ("strength", "expected"),
    [({"choices": [0.0, 0.5]}, 8), ({"low": 0, "high": 1, "step": 0.25}, 20), ({"low": 0, "high": 1}, math.inf)],
)
def test_count_map_kinds_is_infinite_for_a_continuous_strength(strength: dict[str, Any], expected: float) -> None:
    """Two backbones, two cuts, and what augmentation makes of the images; the learning rate does not matter."""
    space = {**BACKBONE, "unfrozen_layers": {"low": 2, "high": 3}, "augmentation_strength": strength}
    spec = make_spec({**space, "lr": {"low": 1e-4, "high": 1e-1}})
    assert count_map_kinds(make_distributions(spec, GROUP_COUNTS)) == expected
