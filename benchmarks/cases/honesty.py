"""Is what tuner prints what production gets? Many small studies, each on its own cut of the images.

    python -m benchmarks honesty --out R.json                 the studies that the file lacks; the same command resumes
    python -m benchmarks honesty --out R.json --studies 42    this many in all, task by task in turn
    python -m benchmarks honesty --out R.json --describe      the numbers again

A study searches, confirms its best few, retrains the confirmed winner and the search's own winner on train + val, and
looks at the locked test split. Optimism is the printed number less the accuracy on test. A regression: a mean optimism
of the confirmed number beyond two standard errors, intervals that cover less than 90 % of the test accuracies, or
intervals wider than 1.5 times what the numbers of images alone would give.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.harness import describe_provenance, find_place, write_json
from benchmarks.material import (
    IMAGES_VARIABLE,
    WEIGHTS_VARIABLE,
    empty_cache,
    find_folder,
    lay_out_classes,
    read_backbones,
)
from benchmarks.study_file import write_study_file

NAME = "honesty"
DEFAULT_STUDIES = 42
_BACKBONE = "mobilenetv2_035"
_N_PER_CLASS = {"sign_digits": 70, "cifar10_small": 70, "neu_steel": 110}


@dataclass(frozen=True, kw_only=True)
class Task:
    """Images to classify, and the search that is tried on them."""

    name: str
    data: dict[str, Any]
    space: dict[str, Any]
    training: dict[str, Any]
    backbones: dict[str, Any]
    n_trials: int


def list_tasks(folder: Path, *, smoke: bool) -> list[Task]:
    """Return the digits tasks, and those on photographs where their files are given.

    Args:
        folder: Where images are written.
        smoke: One small task.
    """
    subsets = {"digits": range(10), "digits_low": range(5), "digits_high": range(5, 10)}
    tasks = [_make_digits_task(name, [str(digit) for digit in digits]) for name, digits in subsets.items()]
    images, weights = find_folder(IMAGES_VARIABLE), find_folder(WEIGHTS_VARIABLE)
    if smoke:
        return tasks[1:2]
    if images is not None and weights is not None:
        backbone = read_backbones(weights)[_BACKBONE]
        tasks += [_make_photo_task(name, images, folder, backbone) for name in _N_PER_CLASS]
    return tasks


def _make_digits_task(name: str, classes: list[str]) -> Task:
    return Task(
        name=name,
        data={"source": "digits", "classes": classes, "image_size": 16},
        space={
            "backbone": {"choices": ["tuner:small_cnn"]},
            "lr": {"low": 1e-4, "high": 1e-1, "log": True},
            "batch_size": {"choices": [32, 64]},
            "augmentation_strength": {"low": 0.0, "high": 0.5, "step": 0.25},
            "weight_decay": {"low": 1e-5, "high": 1e-1, "log": True},
            "label_smoothing": {"low": 0.0, "high": 0.2, "step": 0.1},
        },
        training={"epochs": 8, "horizontal_flip": False},
        backbones={},
        n_trials=24,
    )


def _make_photo_task(name: str, images: Path, folder: Path, backbone: Mapping[str, Any]) -> Task:
    place = lay_out_classes(images, name, folder, n_per_class=_N_PER_CLASS[name])
    return Task(
        name=name,
        data={"source": "image_folder", "path": str(place), "image_size": 64},
        space={
            "backbone": {"choices": [_BACKBONE]},
            "lr": {"low": 1e-4, "high": 1e-1, "log": True},
            "batch_size": {"choices": [16, 32, 64]},
            "unfrozen_layers": {"low": 1, "high": 3},
            "augmentation_strength": {"choices": [0.0, 0.25]},
            "label_smoothing": {"low": 0.0, "high": 0.2, "step": 0.1},
        },
        training={"epochs": 5, "horizontal_flip": name != "sign_digits"},
        backbones={_BACKBONE: dict(backbone)},
        n_trials=20,
    )


def run_study_honestly(task: Task, seed: int, folder: Path, *, smoke: bool) -> dict[str, Any]:
    """Search, confirm, retrain and look at test; return the numbers of one study.

    Args:
        task: What is searched.
        seed: Of splits, sampler and trials.
        folder: Empty; for the study's files.
        smoke: Few trials.
    """
    from tuner import load_spec, run_study, train_best
    from tuner.errors import TunerError

    started = time.perf_counter()
    file, url = folder / "study.toml", f"sqlite:///{folder / 'studies.db'}"
    search = {"n_trials": 2 if smoke else task.n_trials, "confirm_fraction": 0.3}
    tables = {
        "study": {"name": "honest", "seed": seed},
        "data": task.data | {"val_fraction": 0.2, "test_fraction": 0.3},
        "space": task.space,
        "training": task.training | ({"epochs": 1} if smoke else {}),
        "search": search,
        "workers": {"devices": ["cpu"]},
    } | ({"backbones": task.backbones} if task.backbones else {})
    write_study_file(file, tables)
    status = run_study(load_spec(file), storage=url)
    confirmation = status.confirmation
    assert confirmation is not None
    assert status.best is not None
    trials = {"confirmed": confirmation.winner.trial, "raw": status.best.number}
    tests = {}
    for number in sorted(set(trials.values())):
        try:
            result = train_best("honest", folder / f"model_{number}", storage=url, device="cpu", trial=number)
        except TunerError as error:  # a recipe that diverges on more images is worth what chance is
            tests[number] = 0.0
            print(f"{task.name} {seed}: trial {number}: {error}", flush=True)
        else:
            assert result.test is not None
            tests[number] = result.test.scores.accuracy
    prediction = confirmation.prediction
    return {
        "task": task.name,
        "seed": seed,
        "n_val": prediction.n_val,
        "n_test": prediction.n_test,
        "confirmed": prediction.accuracy,
        "winner_mean": confirmation.winner.mean,
        "interval": [prediction.low, prediction.high],
        "binomial_floor": prediction.binomial_floor,
        "raw": status.best.value,
        "trials": trials,
        "test": {kind: tests[number] for kind, number in trials.items()},
        "candidates": [
            {"trial": each.trial, "search": each.search_value, "values": list(each.values)}
            for each in confirmation.candidates
        ],
        "seconds": round(time.perf_counter() - started, 1),
    }


def summarise(studies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the studies say together.

    Args:
        studies: Of ``run_study_honestly``, at least two.
    """
    confirmed = [study["confirmed"] - study["test"]["confirmed"] for study in studies]
    raw = [study["raw"] - study["test"]["raw"] for study in studies]
    gains = [study["test"]["confirmed"] - study["test"]["raw"] for study in studies]
    covered = [study["interval"][0] <= study["test"]["confirmed"] <= study["interval"][1] for study in studies]
    widths = [(study["interval"][1] - study["interval"][0]) / study["binomial_floor"] for study in studies]
    return {
        "n_studies": len(studies),
        "n_tasks": len({study["task"] for study in studies}),
        "confirmed_optimism": _describe(confirmed),
        "raw_optimism": _describe(raw),
        "coverage": fmean(covered),
        "mean_width_to_floor": fmean(widths),
        "gain_of_confirmed_winner": _describe(gains),
        "n_same_winner": sum(study["trials"]["confirmed"] == study["trials"]["raw"] for study in studies),
    }


def _describe(values: Sequence[float]) -> dict[str, float]:
    return {"mean": fmean(values), "standard_error": stdev(values) / len(values) ** 0.5}


def describe_honesty(result: Mapping[str, Any]) -> str:
    """Return a result as the rows of the README's table, over all studies and for each task."""
    rows = [("all", result["studies"])]
    tasks = sorted({study["task"] for study in result["studies"]})
    rows += [(task, [study for study in result["studies"] if study["task"] == task]) for task in tasks]
    lines = [
        "| studies | confirmed - test | search - test | in interval | width / floor | winner - raw winner, on test |",
        "|---|---|---|---|---|---|",
    ]
    for name, studies in rows:
        if len(studies) > 1:
            found = summarise(studies)
            confirmed, raw, gain = (
                f"{found[key]['mean']:+.4f} ± {found[key]['standard_error']:.4f}"
                for key in ("confirmed_optimism", "raw_optimism", "gain_of_confirmed_winner")
            )
            covered, width = f"{found['coverage']:.1%}", f"{found['mean_width_to_floor']:.2f}"
            lines.append(f"| {name}, {len(studies)} | {confirmed} | {raw} | {covered} | {width} | {gain} |")
    return "\n".join(lines)


def run_honesty(out: Path, *, n_studies: int, smoke: bool) -> dict[str, Any]:
    """Run the studies that a result file does not hold yet, and keep it after each.

    Returns:
        The result, as it is on disk.
    """
    result: dict[str, Any] = {"case": NAME, "studies": [], "provenance": describe_provenance()}
    if out.exists():
        result = json.loads(out.read_text(encoding="utf-8"))
    done = {(study["task"], study["seed"]) for study in result["studies"]}
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name, empty_cache():
        folder = Path(name)
        tasks = list_tasks(folder / "images", smoke=smoke)
        for number in range(n_studies):
            seed, position = divmod(number, len(tasks))
            task = tasks[position]
            if (task.name, seed) in done:
                continue
            place = folder / f"{task.name}_{seed}"
            place.mkdir()
            result["studies"].append(run_study_honestly(task, seed, place, smoke=smoke))
            if len(result["studies"]) > 1:
                result["summary"] = summarise(result["studies"])
            write_json(out, result)
    return result


def main(options: argparse.Namespace) -> None:
    """Run the case, print its table, and keep what was measured."""
    provenance = describe_provenance()
    out = options.out or find_place(NAME, provenance)
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            print(describe_honesty(run_honesty(Path(folder, "result.json"), n_studies=2, smoke=True)))
        return
    if not options.describe:
        run_honesty(out, n_studies=options.studies, smoke=False)
    print(describe_honesty(json.loads(out.read_text(encoding="utf-8"))))
