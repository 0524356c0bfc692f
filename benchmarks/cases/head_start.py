"""Do deeper trials end better from a head that was trained alone first (linear probing, then fine-tuning)?

    python -m benchmarks head_start --out R.json                the runs that the file lacks; the same command resumes
    python -m benchmarks head_start --out R.json --describe     the numbers again

For each data set, seed and backbone: a screen of heads, then pairs of trials, from a new head and from the screen's
best, with as many epochs, at several learning rates, with two layer groups and with all. Each seed cuts train and val
anew. Arms are compared at the learning rate that suits each best. The rule: a head start becomes the default of studies
with a screen if the mean difference of the last val accuracy is above 0 by more than two standard errors, and in no
data set below 0 by more than two. A regression: it is the default, and does not pass.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean, median, stdev
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.cases.step_overhead import one_thread
from benchmarks.harness import describe_provenance, find_place, write_json
from benchmarks.material import (
    IMAGES_VARIABLE,
    WEIGHTS_VARIABLE,
    empty_cache,
    find_folder,
    lay_out_classes,
    make_tiny_weights,
    read_backbones,
)
from benchmarks.study_file import write_study_file

if TYPE_CHECKING:
    from tuner.service.messages import EpochDone, Reply, Verdict
    from tuner.spec.sections import StudySpec
    from tuner.trial import TrialParams

NAME = "head_start"
ARMS = ("none", "screen")
DATASETS = {"hymenoptera": 150, "sign_digits": 30}
"""Images of each class."""
IMAGE_SIZE = 64
BATCH_SIZE = 16
VAL_FRACTION = 0.4
BACKBONES = ("mobilenetv2_035", "mobilenetv2_100")
RATES: dict[int | str, tuple[float, ...]] = {2: (1e-3, 1e-2), "all": (3e-4, 3e-3)}
"""By unfrozen layers: what spares the backbone, and what moves it, so that each arm may have what suits it."""
HEAD_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
EPOCHS = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is compared."""

    data: Mapping[str, dict[str, Any]]
    """``[data]`` of each data set."""
    backbones: Mapping[str, dict[str, Any]]
    """``[backbones."NAME"]`` of each."""
    rates: Mapping[int | str, tuple[float, ...]] = field(default_factory=lambda: RATES)
    """By unfrozen layers."""
    head_rates: tuple[float, ...] = HEAD_RATES
    epochs: int = EPOCHS


def make_settings(folder: Path, *, smoke: bool) -> Settings:
    """Return the whole comparison on real photographs and weights, or a small one on digits.

    Args:
        folder: Where images are written.
        smoke: Take digits, whatever is given.
    """
    images, weights = find_folder(IMAGES_VARIABLE), find_folder(WEIGHTS_VARIABLE)
    if smoke or images is None or weights is None:
        data = {"source": "digits", "classes": ["7", "8", "9"], "image_size": 32}
        return Settings(
            data={"digits": data},
            backbones={"test_resnet": make_tiny_weights(folder)["test_resnet"]},
            rates={2: (1e-3,), "all": (1e-3,)},
            head_rates=(1e-2, 1e-1),
            epochs=2,
        )
    places = {name: lay_out_classes(images, name, folder, n_per_class=count) for name, count in DATASETS.items()}
    sections = read_backbones(weights)
    return Settings(
        data={
            name: {"source": "image_folder", "path": str(place), "image_size": IMAGE_SIZE}
            for name, place in places.items()
        },
        backbones={name: sections[name] for name in BACKBONES},
    )


@dataclass(kw_only=True)
class _Listener:
    """Stands in for the coordinator: lets every trial go on, and keeps its curve and when it began to train."""

    curves: dict[int, list[float]] = field(default_factory=dict)
    started: float = 0.0

    def send(self, reply: "Reply") -> None:
        """Note that a trial has its head and begins."""
        from tuner.service.messages import Started

        if isinstance(reply, Started):
            self.started = perf_counter()

    def ask_verdict(self, done: "EpochDone") -> "Verdict":
        """Keep an epoch."""
        from tuner.service.messages import Verdict

        for number, result in done.results:
            self.curves.setdefault(number, []).append(result.val_accuracy)
        return Verdict()


class Comparison:
    """One worker on one cut of a data set, with one backbone."""

    def __init__(self, settings: Settings, folder: Path, *, dataset: str, seed: int, backbone: str) -> None:
        from tuner import load_spec
        from tuner.models.layers import group_layers
        from tuner.service.study_data import read_study_data
        from tuner.service.training_session import TrainingSession
        from tuner.service.workbench import Workbench

        self._settings, self._seed = settings, seed
        tables = {
            "study": {"name": NAME, "seed": seed},
            "data": dict(settings.data[dataset]) | {"val_fraction": VAL_FRACTION},
            "space": {"lr": {"low": 1e-5, "high": 1.0, "log": True}},
            "training": {
                "backbone": backbone,
                "batch_size": BATCH_SIZE,
                "epochs": settings.epochs,
                "horizontal_flip": dataset == "hymenoptera",
            },
            "backbones": {backbone: settings.backbones[backbone]},
        }
        write_study_file(folder / "study.toml", tables)
        self._spec: StudySpec = load_spec(folder / "study.toml")
        self._listener = _Listener()
        bench = Workbench(self._spec, read_study_data(self._spec), device="cpu", n_threads=1, note=print)
        self._session = TrainingSession(bench, self._listener)
        self._session.prepare(None)
        self._n_groups = len(group_layers(bench.make_model(self._make_params(1e-3, 1))))
        self._n_trained = 0

    def _make_params(self, rate: float, unfrozen_layers: int, augmentation_strength: float = 0.0) -> "TrialParams":
        from tuner.search.distributions import resolve_params

        point = {"lr": rate, "unfrozen_layers": unfrozen_layers, "augmentation_strength": augmentation_strength}
        backbone = self._spec.backbone_names()[0]
        return resolve_params(self._spec, point, {backbone: unfrozen_layers}, seed=self._seed)

    def _train(self, *recipes: "TrialParams", uses_features: bool) -> tuple[list[list[float]], float, float]:
        """Return the curves, and the seconds before the first epoch and from there on."""
        from tuner.service.messages import Train

        numbers = range(self._n_trained, self._n_trained + len(recipes))
        self._n_trained += len(recipes)
        began = perf_counter()
        self._session.train(
            Train(data_hash="", members=tuple(zip(numbers, recipes, strict=True)), uses_features=uses_features)
        )
        before = self._listener.started - began
        return [self._listener.curves[each] for each in numbers], before, perf_counter() - self._listener.started

    def run(self) -> list[dict[str, Any]]:
        """Screen heads, then train the pairs; return a run for each depth and learning rate."""
        from tuner.trial import HeadStart

        heads = [replace(self._make_params(rate, 1), seed=self._seed + 1) for rate in self._settings.head_rates]
        curves, *_ = self._train(*heads, uses_features=True)
        best = max(range(len(heads)), key=lambda number: curves[number][-1])
        starts = {"none": None, "screen": HeadStart.take_from(heads[best])}
        runs: list[dict[str, Any]] = []
        for depth, rate in [(depth, rate) for depth, rates in self._settings.rates.items() for rate in rates]:
            layers = self._n_groups if depth == "all" else int(depth)
            plain = self._make_params(rate, layers, augmentation_strength=0.25)
            run: dict[str, Any] = {"depth": depth, "lr": rate, "head_lr": heads[best].lr, "head": curves[best][-1]}
            for arm in ARMS if (self._seed + len(runs)) % 2 else reversed(ARMS):  # neither is always the first
                (curve,), before, seconds = self._train(replace(plain, head_start=starts[arm]), uses_features=False)
                run[arm] = {"val_accuracy": curve, "seconds_before": before, "seconds": seconds}
            runs.append(run)
        return runs


def choose_rates(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], float]:
    """Return the learning rate that ends best, on average over the seeds, for each arm of each cell."""
    values: dict[tuple[Any, ...], dict[float, list[float]]] = {}
    for run, arm in product(runs, ARMS):
        rates = values.setdefault((*_cell(run), arm), {})
        rates.setdefault(run["lr"], []).append(run[arm]["val_accuracy"][-1])
    return {key: max(rates, key=lambda rate: fmean(rates[rate])) for key, rates in values.items()}


def _cell(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return run["dataset"], run["backbone"], run["depth"]


def list_differences(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], list[list[float]]]:
    """Return, by data set and seed, how much better each cell's trial with a head start is after each epoch.

    Each arm stands at its own best learning rate, of equally many.
    """
    rates = choose_rates(runs)
    at = {(*_cell(run), run["seed"], run["lr"]): run for run in runs}
    found: dict[tuple[str, int], list[list[float]]] = {}
    for *cell, seed in sorted({(*_cell(run), run["seed"]) for run in runs}, key=str):
        plain, started = (at[*cell, seed, rates[*cell, arm]][arm]["val_accuracy"] for arm in ARMS)
        pairs = zip(started, plain, strict=True)
        found.setdefault((cell[0], seed), []).append([better - worse for better, worse in pairs])
    return found


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the runs say together. Cells of one data set and seed share images, and are averaged first.

    Args:
        runs: Of at least two seeds.
    """
    curves = {key: [fmean(cells) for cells in zip(*own, strict=True)] for key, own in list_differences(runs).items()}
    datasets = sorted({dataset for dataset, _ in curves})
    by_dataset = {name: [curve for (each, _), curve in curves.items() if each == name] for name in datasets}
    overall = _describe_curves(list(curves.values()))
    each = {name: _describe_curves(own) for name, own in by_dataset.items()}
    is_better = overall[-1]["mean"] > 2 * overall[-1]["standard_error"]
    is_worse = [name for name, own in each.items() if own[-1]["mean"] < -2 * own[-1]["standard_error"]]
    return {
        "n_units": len(curves),
        "n_trials": len(ARMS) * len(runs),
        "difference_by_epoch": overall,
        "by_dataset": each,
        "by_depth": _describe_parts(runs, "depth"),
        "by_backbone": _describe_parts(runs, "backbone"),
        "median_seconds_of_a_head_start": median(
            run["screen"]["seconds_before"] - run["none"]["seconds_before"] for run in _list_first(runs)
        ),
        "median_seconds_of_a_trial": median(run["none"]["seconds"] for run in runs),
        "is_default": is_better and not is_worse,
    }


def _list_first(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the first run of each comparison: the later ones find their head in memory."""
    first: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for run in runs:
        first.setdefault((run["dataset"], run["seed"], run["backbone"]), run)
    return list(first.values())


def _describe_parts(runs: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[dict[str, float]]]:
    parts = {}
    for value in sorted({run[key] for run in runs}, key=str):
        found = list_differences([run for run in runs if run[key] == value])
        parts[str(value)] = _describe_curves(
            [[fmean(cells) for cells in zip(*own, strict=True)] for own in found.values()]
        )
    return parts


def _describe_curves(curves: Sequence[Sequence[float]]) -> list[dict[str, float]]:
    return [
        {"mean": fmean(values), "standard_error": stdev(values) / len(values) ** 0.5}
        for values in zip(*curves, strict=True)
    ]


def describe_head_start(result: Mapping[str, Any]) -> str:
    """Return a result as the rows of the README's table, and what follows from the rule."""
    found = summarise(result["runs"])
    n_epochs = len(found["difference_by_epoch"])
    rows = {f"all, {found['n_units']} cuts": found["difference_by_epoch"]} | found["by_dataset"]
    rows |= {f"unfrozen_layers = {depth}": curve for depth, curve in found["by_depth"].items()} | found["by_backbone"]
    lines = [
        "| val accuracy with a head start less without | "
        + " | ".join(f"epoch {n + 1}" for n in range(n_epochs))
        + " |",
        "|---" * (n_epochs + 1) + "|",
    ]
    for name, curve in rows.items():
        cells = (f"{point['mean']:+.4f} ± {point['standard_error']:.4f}" for point in curve)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    start, trial = found["median_seconds_of_a_head_start"], found["median_seconds_of_a_trial"]
    verdict = "the default with a screen" if found["is_default"] else "not the default"
    lines.append(f"{found['n_trials']} trials; medians: a head start takes {start:.2f} s, a trial {trial:.1f} s")
    lines.append(f"by the rule a head start is {verdict}")
    return "\n".join(lines)


def run_head_start(out: Path, *, n_seeds: int, smoke: bool) -> dict[str, Any]:
    """Make the comparisons that a result file does not hold yet, and keep it after each.

    Returns:
        The result, as it is on disk.
    """
    result: dict[str, Any] = {"case": NAME, "runs": [], "provenance": describe_provenance()}
    if out.exists():
        result = json.loads(out.read_text(encoding="utf-8"))
    done = {(run["dataset"], run["seed"], run["backbone"]) for run in result["runs"]}
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name, empty_cache(), one_thread():
        folder = Path(name)
        settings = make_settings(folder, smoke=smoke)
        for backbone, seed, dataset in product(settings.backbones, range(n_seeds), settings.data):
            if (dataset, seed, backbone) in done:
                continue
            labels = {"dataset": dataset, "seed": seed, "backbone": backbone}
            runs = Comparison(settings, folder, **labels).run()
            result["runs"] += [labels | run for run in runs]
            if seed > 0 and dataset == list(settings.data)[-1]:  # every data set has two seeds
                result["summary"] = summarise(result["runs"])
            write_json(out, result)
    return result


def main(options: argparse.Namespace) -> None:
    """Run the case, print its table, and keep what was measured."""
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            print(describe_head_start(run_head_start(Path(folder, "result.json"), n_seeds=2, smoke=True)))
        return
    out = options.out or find_place(NAME, describe_provenance())
    if not options.describe:
        run_head_start(out, n_seeds=options.seeds, smoke=False)
    print(describe_head_start(json.loads(out.read_text(encoding="utf-8"))))
