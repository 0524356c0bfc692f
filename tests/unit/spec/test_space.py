"""Tests of tuner.spec.space."""

import math
import sys

import pytest

from tuner.spec.space import (
    PARAMETERS,
    Choices,
    Distribution,
    FloatRange,
    IntRange,
    contains,
    describe,
    is_number,
    parse_distribution,
)


@pytest.mark.parametrize(
    ("name", "table", "expected"),
    [
        ("backbone", {"choices": ["a", "b"]}, Choices(choices=("a", "b"))),
        ("batch_size", {"choices": [32, 16]}, Choices(choices=(32, 16))),
        ("lr", {"low": 1, "high": 2}, FloatRange(low=1.0, high=2.0)),
        ("lr", {"low": 1e-5, "high": 0.1, "log": True}, FloatRange(low=1e-5, high=0.1, log=True)),
        ("dropout", {"low": 0.0, "high": 0.3, "step": 0.1}, FloatRange(low=0.0, high=0.3, step=0.1)),
        ("batch_size", {"low": 8, "high": 64, "step": 8}, IntRange(low=8, high=64, step=8)),
        ("unfrozen_layers", {"low": 1, "high": "all"}, IntRange(low=1, high="all")),
        ("lr", {"low": 0.1, "high": 0.1}, FloatRange(low=0.1, high=0.1)),
    ],
)
def test_parse_distribution_reads_each_kind(name: str, table: object, expected: Distribution) -> None:
    """Choices keep their order, and a param's kind decides between the two ranges."""
    assert parse_distribution(name, table) == (expected, [])


@pytest.mark.parametrize(
    ("name", "table", "problem"),
    [
        (
            "lr",
            3,
            "space.lr: must be a distribution such as { low = ..., high = ... }, got 3; fixed values go to [training]",
        ),
        (
            "optimizer",
            3,
            "space.optimizer: must be a distribution such as { choices = [...] }, got 3; fixed values go to [training]",
        ),
        (
            "optimizer",
            {"low": 1, "high": 2},
            "space.optimizer: must be a distribution such as { choices = [...] }, got {'low': 1, 'high': 2}",
        ),
        ("lr", {"low": 0.1}, "space.lr.high: is missing"),
        ("lr", {"low": 0.1, "high": 0.2, "stepp": 1}, "space.lr.stepp: unknown key; did you mean 'step'?"),
        ("lr", {"choices": [0.1], "low": 0.1}, "space.lr.low: unknown key"),
        ("lr", {"choices": 0.1}, "space.lr.choices: must be a list with at least one entry, got 0.1"),
        ("lr", {"choices": []}, "space.lr.choices: must be a list with at least one entry, got []"),
        ("lr", {"choices": [0.1, 0.1]}, "space.lr.choices: must hold each entry once, got [0.1, 0.1]"),
        ("lr", {"choices": [-0.1]}, "space.lr.choices: must be greater than 0, got -0.1"),
        ("lr", {"choices": [[0.1]]}, "space.lr.choices: must be a number, got [0.1]"),
        (
            "optimizer",
            {"choices": ["adan"]},
            "space.optimizer.choices: must be one of adamw, adam, sgd, got 'adan'; did you mean 'adam'?",
        ),
        ("lr", {"low": 0.2, "high": 0.1}, "space.lr: low must not exceed high, got low = 0.2, high = 0.1"),
        ("lr", {"low": "a", "high": 0.1}, "space.lr.low: must be a number, got 'a'"),
        ("lr", {"low": True, "high": 0.1}, "space.lr.low: must be a number, got True"),
        ("lr", {"low": 0.1, "high": math.inf}, "space.lr.high: must be a number, got inf"),
        ("lr", {"low": 0.1, "high": "all"}, "space.lr.high: must be a number, got 'all'"),
        ("dropout", {"low": 0.0, "high": 1.0}, "space.dropout.high: must lie in [0, 1), got 1.0"),
        ("batch_size", {"low": 8.0, "high": 64}, "space.batch_size.low: must be a whole number, got 8.0"),
        ("batch_size", {"low": 8, "high": 64, "step": 8.0}, "space.batch_size.step: must be a whole number, got 8.0"),
        ("batch_size", {"low": 8, "high": 64, "step": 9}, "space.batch_size.step: must divide high - low = 56, got 9"),
        ("lr", {"low": 0.1, "high": 0.2, "log": 1}, "space.lr.log: must be true or false, got 1"),
        (
            "weight_decay",
            {"low": 0, "high": 0.1, "log": True},
            "space.weight_decay.low: must be greater than 0 with log = true, got 0",
        ),
        (
            "lr",
            {"low": 0.1, "high": 0.2, "log": True, "step": 0.1},
            "space.lr.step: must be left out with log = true, got 0.1",
        ),
        ("lr", {"low": 0.1, "high": 0.4, "step": 0}, "space.lr.step: must be greater than 0, got 0"),
        ("lr", {"low": 0.1, "high": 0.4, "step": math.nan}, "space.lr.step: must be greater than 0, got nan"),
        ("lr", {"low": 0.1, "high": 0.4, "step": math.inf}, "space.lr.step: must be greater than 0, got inf"),
        ("lr", {"low": 0.1, "high": 0.4, "step": 0.2}, "space.lr.step: must divide high - low = 0.3, got 0.2"),
    ],
)
def test_parse_distribution_names_the_problem(name: str, table: object, problem: str) -> None:
    """Each mistake in an entry of [space] gives one line."""
    assert parse_distribution(name, table) == (None, [problem])


def test_parse_distribution_lists_all_problems() -> None:
    """Two wrong bounds are two lines."""
    _, problems = parse_distribution("batch_size", {"low": 0, "high": 1.5})
    assert problems == [
        "space.batch_size.low: must be at least 1, got 0",
        "space.batch_size.high: must be a whole number, got 1.5",
    ]


@pytest.mark.parametrize(
    ("distribution", "inside", "outside"),
    [
        (Choices(choices=(1, 16)), [1, 16, 16.0], [2, True, "16", None]),
        (Choices(choices=("a",)), ["a"], ["b", 1]),
        (FloatRange(low=0.1, high=0.4), [0.1, 0.25, 0.4], [0.09, 0.41, "0.2", True, math.nan, math.inf]),
        (FloatRange(low=0.1, high=0.4, step=0.1), [0.1, 0.2, 0.3, 0.4], [0.15, 0.5, math.nan]),
        (IntRange(low=2, high=8, step=3), [2, 5, 8], [3, 11]),
        (IntRange(low=1, high="all"), [1, 99], [0, "all"]),
    ],
)
def test_contains_tells_points_from_other_values(
    distribution: Distribution, inside: list[object], outside: list[object]
) -> None:
    """Bounds belong to a range, steps count from low, and true is not 1."""
    assert [contains(distribution, value) for value in inside] == [True] * len(inside)
    assert [contains(distribution, value) for value in outside] == [False] * len(outside)


@pytest.mark.parametrize(
    ("distribution", "text"),
    [
        (Choices(choices=(16, 32)), "one of 16, 32"),
        (FloatRange(low=1e-5, high=0.1, log=True), "[1e-05, 0.1] log"),
        (FloatRange(low=0.0, high=1.0, step=0.25), "[0.0, 1.0] step 0.25"),
        (IntRange(low=1, high="all"), "[1, all]"),
        (IntRange(low=8, high=64, step=8), "[8, 64] step 8"),
    ],
)
def test_describe_reads_as_a_person_writes(distribution: Distribution, text: str) -> None:
    """A distribution is described in one short phrase."""
    assert describe(distribution) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", None, 10**400])
def test_is_number_refuses_what_no_param_can_be(value: object) -> None:
    """Numbers are finite and fit a float; true is none."""
    assert not is_number(value)


def test_is_number_takes_the_largest_float() -> None:
    """Whole numbers and floats up to the largest float are numbers."""
    assert is_number(sys.float_info.max)
    assert is_number(-3)


def test_parameters_have_valid_defaults() -> None:
    """A default passes the check of its own param, where there is one; "all" is resolved later."""
    for name, parameter in PARAMETERS.items():
        if parameter.default not in {None, "all"}:
            assert parameter.find_problem(parameter.default) == "", name
