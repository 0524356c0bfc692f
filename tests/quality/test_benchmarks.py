"""Benchmarks run, so that they cannot rot."""

import ast
from pathlib import Path

import pytest

from benchmarks.__main__ import CASES
from benchmarks.arms import plain_script
from benchmarks.cases.head_start import describe_head_start, run_head_start
from benchmarks.cases.head_start import summarise as head_start_of
from benchmarks.cases.honesty import describe_honesty, run_honesty
from benchmarks.cases.honesty import summarise as honesty_of
from benchmarks.cases.search_speed import run_search_speed
from benchmarks.cases.views import ARMS as VIEW_ARMS
from benchmarks.cases.views import choose_default, compare, describe_views, run_views
from benchmarks.harness import describe, measure
from benchmarks.search_settings import smoke_settings
from benchmarks.search_summary import describe_summary, summarise


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_case_runs_in_smoke_mode(name: str) -> None:
    """Every arm of a case gives a number."""
    case = CASES[name]
    result = measure(case, n_repeats=1, smoke=True)
    assert all(numbers["median"] > 0 for numbers in result["arms"].values())
    assert case.baseline in describe(result)


@pytest.mark.slow
def test_search_speed_runs_its_arms_in_smoke_mode_and_resumes(tmp_path: Path) -> None:
    """Every arm finishes its trials, a claim is refitted, and a second call has nothing to do."""
    settings = smoke_settings(tmp_path / "result.json")
    result = run_search_speed(settings)
    assert {run["arm"] for run in result["runs"]} == {"B", "D"}
    for run in result["runs"]:
        assert len(run["trials"]) >= 2, run["error"]
        assert "refit_best" in run or run["arm"] != "B"
    assert "| S2 | D | 1 |" in describe_summary(result)
    assert run_search_speed(settings)["runs"] == result["runs"]


@pytest.mark.slow
def test_honesty_runs_a_study_in_smoke_mode_and_resumes(tmp_path: Path) -> None:
    """One study gives every number that is summed up, and a second call has nothing to do."""
    out = tmp_path / "result.json"
    result = run_honesty(out, n_studies=1, smoke=True)
    (study,) = result["studies"]
    assert study["interval"][0] <= study["confirmed"] <= study["interval"][1]
    assert set(study["test"]) == {"confirmed", "raw"}
    assert run_honesty(out, n_studies=1, smoke=True) == result
    two = {**result, "studies": [study, study]}
    assert "| all, 2 | " in describe_honesty(two)
    assert honesty_of(two["studies"])["confirmed_optimism"]["standard_error"] == 0


@pytest.mark.slow
def test_views_runs_its_arms_in_smoke_mode_and_resumes(tmp_path: Path) -> None:
    """Every arm that was asked for gives an accuracy, and a second call trains what is new alone."""
    out = tmp_path / "result.json"
    result = run_views(out, n_seeds=1, smoke=True, layers=("2",))
    assert sorted(run["arm"] for run in result["runs"]) == sorted(VIEW_ARMS)
    assert run_views(out, n_seeds=1, smoke=True, layers=("2",))["runs"] == result["runs"]
    more = run_views(out, n_seeds=2, smoke=True, arms=("K=8", "fresh"), layers=("1", "2"))
    assert more["runs"][: len(VIEW_ARMS)] == result["runs"]
    assert len(more["runs"]) == len(VIEW_ARMS) + 6
    assert "| digits | 2 | K=8 | 2 | " in describe_views(more)


def make_training(
    arm: str, seed: int, accuracy: float, *, data: str = "a", unfrozen_layers: int | str = 2
) -> dict[str, object]:
    """Return a training of the study of views."""
    recipe = {"unfrozen_layers": unfrozen_layers, "lr": 1.0}
    return {"data": data, "recipe": recipe, "seed": seed, "arm": arm, "accuracy": accuracy, "loss": 1.0}


def test_views_are_compared_with_fresh_ones_of_the_same_seed() -> None:
    """What differs between seeds is in no difference; a training without its pair is left out."""
    runs = [
        make_training("fresh", 0, 0.5),
        make_training("K=2", 0, 0.4),
        make_training("fresh", 1, 0.9),
        make_training("K=2", 1, 0.8),
        make_training("K=2", 2, 0.1),
        make_training("fresh", 0, 0.1, unfrozen_layers="all"),
    ]
    entry = compare(runs)[0]
    assert (entry["arm"], entry["unfrozen_layers"], entry["n"]) == ("K=2", 2, 2)
    assert entry["difference"] == pytest.approx(-0.1)
    assert entry["standard_error"] == pytest.approx(0.0, abs=1e-9)


def make_entries(
    differences: dict[int, float], data: str = "a", standard_error: float = 0.001, unfrozen_layers: int | str = 2
) -> list[dict[str, object]]:
    """Return comparisons of numbers of views."""
    shared = {"data": data, "unfrozen_layers": unfrozen_layers, "standard_error": standard_error}
    return [{**shared, "arm": f"K={n_views}", "difference": gain} for n_views, gain in differences.items()]


def test_default_views_are_the_fewest_from_which_on_none_is_worse() -> None:
    """With all recipes of frozen layers, by 0.5 points or a standard error; a lucky K below a bad one counts not."""
    good = make_entries({1: -0.03, 2: -0.004, 4: 0.01, 8: 0.0})
    assert choose_default(good) == 2
    assert choose_default(good + make_entries({1: 0.0, 2: 0.0, 4: -0.02, 8: -0.001}, data="b")) == 8
    assert choose_default(make_entries({1: -0.009, 2: 0.0, 4: 0.0, 8: 0.0}, standard_error=0.01)) == 1
    assert choose_default(make_entries({1: 0.0, 2: 0.0, 4: 0.0, 8: -0.02})) is None
    assert choose_default(good + make_entries({1: -0.1, 2: -0.1, 4: -0.1, 8: -0.1}, unfrozen_layers=1)) is None
    assert choose_default(good + make_entries({1: -0.1, 2: -0.1, 4: -0.1, 8: -0.1}, unfrozen_layers="all")) == 2


@pytest.mark.slow
def test_head_start_runs_its_pairs_in_smoke_mode_and_resumes(tmp_path: Path) -> None:
    """Both arms of each pair are trained as long, and a second call has nothing to do."""
    out = tmp_path / "result.json"
    result = run_head_start(out, n_seeds=2, smoke=True)
    assert len(result["runs"]) == 4
    for run in result["runs"]:
        assert len(run["none"]["val_accuracy"]) == len(run["screen"]["val_accuracy"]) == 2
    assert run_head_start(out, n_seeds=2, smoke=True) == result
    assert "by the rule a head start is " in describe_head_start(result)


@pytest.mark.parametrize(
    ("gains", "is_default"), [((0.1, 0.12), True), ((0.1, -0.05), False), ((-0.001, -0.001), False)]
)
def test_head_start_becomes_the_default_by_its_rule(gains: tuple[float, float], *, is_default: bool) -> None:
    """A clear gain over all, and no data set that clearly loses, each arm at its own best learning rate."""
    runs = [
        {
            "dataset": dataset,
            "backbone": "b",
            "depth": 2,
            "lr": lr,
            "seed": seed,
            "none": {"val_accuracy": [0.5 + (lr == 1e-2) / 10], "seconds_before": 1.0, "seconds": 2.0},
            "screen": {
                "val_accuracy": [0.6 + gain + seed / 1000 - (lr == 1e-2) / 10],
                "seconds_before": 1.5,
                "seconds": 2.0,
            },
        }
        for dataset, gain in zip(("x", "y"), gains, strict=True)
        for lr in (1e-3, 1e-2)
        for seed in (0, 1, 2)
    ]
    found = head_start_of(runs)
    assert found["difference_by_epoch"][0]["mean"] == pytest.approx(sum(gains) / 2 + 0.001)
    assert found["is_default"] is is_default
    assert found["median_seconds_of_a_head_start"] == 0.5


def test_plain_script_stands_alone() -> None:
    """Nothing of tuner, and nothing of the benchmark, works for the script it is compared with."""
    tree = ast.parse(Path(plain_script.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name.split(".")[0] in {"tuner", "benchmarks"}}


def make_run(arm: str, seed: int, *, seconds: float, best: float, n_trials: int = 10) -> dict[str, object]:
    """Return a run of equally long trials, the last of which is the best."""
    rows = [
        [seconds * (number + 1) / n_trials, "COMPLETE", best * (number + 1) / n_trials, 3, 0]
        for number in range(n_trials)
    ]
    return {
        "space": "S1",
        "arm": arm,
        "seed": seed,
        "seconds": seconds,
        "busy_cores": 0.0,
        "refit_best": best,
        "trials": rows,
    }


def test_summary_pairs_seeds_and_takes_the_better_baseline() -> None:
    """A ratio compares runs of one seed, with the faster of A and B."""
    runs = [
        make_run("A", 0, seconds=100.0, best=1.0),
        make_run("B", 0, seconds=50.0, best=1.0),
        make_run("D", 0, seconds=10.0, best=1.0),
    ]
    entry = summarise(runs, {"S1": 1.0})[-1]
    assert entry["ratios"]["trials_per_hour"] == [5.0, 5.0, 5.0]
    assert entry["ratios"]["time_to_target"] == {"ratio": [5.0, 5.0, 5.0], "n": 1, "n_bounds": 0}


def test_summary_counts_a_run_that_misses_the_target_as_censored() -> None:
    """A run that never reaches the target counts as longer than it lasted, and its ratio is a bound."""
    runs = [make_run("A", 0, seconds=100.0, best=0.5), make_run("D", 0, seconds=10.0, best=1.0)]
    slow, fast = summarise(runs, {"S1": 1.0})
    assert slow["n_censored"] == 1
    assert slow["seconds_to_target"] == [None, None, None]
    assert fast["ratios"]["time_to_target"] == {"ratio": [10.0, 10.0, 10.0], "n": 1, "n_bounds": 1}


def test_summary_leaves_screened_trials_out_of_the_rate() -> None:
    """What a screen adds counts for the best value, not for the trials of the search."""
    run = make_run("D", 0, seconds=10.0, best=1.0)
    rows = run["trials"]
    assert isinstance(rows, list)
    rows[-1][4] = 1
    entry = summarise([run], {})[0]
    assert entry["n_trials"] == [9, 9, 9]
    assert entry["n_screened"] == [1, 1, 1]
    assert entry["best"] == [1.0, 1.0, 1.0]
