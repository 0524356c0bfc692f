"""How many fixed views of each image does it take to train as well as on images that are augmented anew every epoch?

    python -m benchmarks views --out R.json --seeds 6     the trainings that the file lacks; the same command resumes
    python -m benchmarks views --out R.json --seeds 12 --views K=8,fresh --layers 1,2    some of them
    python -m benchmarks views --out R.json --describe    the table again

Arms: K = 1, 2, 4 and 8 fixed views, fresh views, and no augmentation, which shows how much there was to lose. Recipes:
the head alone, the last two layer groups, all layers. Unit: accuracy on val, which chooses nothing here: recipes and
epochs are fixed beforehand. A training of an arm is paired with that of fresh views on the same images, recipe and seed
(of head, order and views), and has as many steps; the arms of a pair follow each other in random order. Standard errors
are those of the mean over trainings: the images of val are the same in all.

The rule for the default: the smallest K which, like every larger one, is with no recipe that leaves layers frozen, on
no data set, worse than fresh views by more than 0.5 points, or by more than one standard error where that is larger.
Where all layers train there is nothing to keep of a view. A regression: a larger K follows than the README says, or
none.
"""

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import describe_provenance, find_place, write_json
from benchmarks.material import (
    IMAGES_VARIABLE,
    WEIGHTS_VARIABLE,
    empty_cache,
    find_folder,
    make_material,
)
from benchmarks.search_settings import names_of
from benchmarks.study_file import write_study_file

if TYPE_CHECKING:
    from tuner.service.workbench import Workbench

NAME = "views"
BASELINE = "fresh"
ARMS: dict[str, dict[str, Any]] = {
    "K=1": {"views": 1},
    "K=2": {"views": 2},
    "K=4": {"views": 4},
    "K=8": {"views": 8},
    BASELINE: {"views": "fresh"},
    "no augmentation": {"augmentation_strength": 0.0},
}
"""What an arm changes in a recipe."""
LAYERS = ("1", "2", "all")
"""Unfrozen layers of the recipes."""
MARGIN = 0.005
_EPOCHS = 16
_BATCH_SIZE = 32
_STRENGTH = 0.5
_BACKBONE = "mobilenetv2_035"
_TINY_BACKBONE = "test_resnet"
_RECIPES: tuple[dict[str, Any], ...] = (
    {"unfrozen_layers": 1, "lr": 1e-2},
    {"unfrozen_layers": 2, "lr": 1e-3},
    {"unfrozen_layers": "all", "lr": 1e-3},
)


@dataclass(frozen=True, kw_only=True)
class Images:
    """A data set to train on."""

    name: str
    horizontal_flip: bool
    n_classes: int | None = None
    """The first ones by name; None: all."""


REAL = (
    Images(name="sign_digits", horizontal_flip=False),
    Images(name="caltech101", horizontal_flip=True, n_classes=30),
)
_SIZE = 64
DIGITS = Images(name="digits", horizontal_flip=False)


def open_bench(folder: Path, images: Images, *, smoke: bool) -> "Workbench":
    """Return a data set with a backbone to train, as a worker of a study has them.

    Args:
        folder: Empty; for images and weights.
        images: Which.
        smoke: A few digits and a tiny model.
    """
    from tuner import load_spec
    from tuner.service.study_data import read_study_data
    from tuner.service.workbench import Workbench

    material = make_material(folder, dataset=images.name, image_size=_SIZE, smoke=smoke)
    backbone = _BACKBONE if _BACKBONE in material.backbones else _TINY_BACKBONE
    data: dict[str, Any] = {"source": "image_folder", "path": str(material.folder), "image_size": material.image_size}
    if images.n_classes is not None:
        data["classes"] = sorted(place.name for place in (material.folder / "train").iterdir())[: images.n_classes]
    file = folder / "study.toml"
    training = {"backbone": backbone, "batch_size": _BATCH_SIZE, "horizontal_flip": images.horizontal_flip}
    tables: dict[str, dict[str, Any]] = {
        "study": {"name": NAME},
        "data": data,
        "space": {"lr": {"low": 1e-4, "high": 1e-1, "log": True}},
        "backbones": {backbone: {**material.backbones[backbone], "interpolation": "bicubic"}},
        "training": training | {"epochs": 2 if smoke else _EPOCHS, "augmentation_strength": _STRENGTH},
        "workers": {"devices": ["cpu"]},
    }
    write_study_file(file, tables)
    spec = load_spec(file)
    return Workbench(spec, read_study_data(spec), device="cpu", n_threads=1, note=print)


def train_changed(
    bench: "Workbench", recipe: Mapping[str, Any], changes: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Train a recipe with what an arm changes in it; return its accuracy and loss on val after its last epoch."""
    from dataclasses import replace

    from tuner.models.layers import group_layers
    from tuner.search.distributions import resolve_params
    from tuner.training.batches import predict_logits
    from tuner.training.loop import TrainingJob, train_only
    from tuner.training.metrics import score_logits

    (backbone,) = bench.spec.backbone_names()
    head = resolve_params(bench.spec, {"lr": recipe["lr"]}, {backbone: 1}, seed=seed)
    n_groups = len(group_layers(bench.make_model(head)))
    params = resolve_params(bench.spec, dict(recipe), {backbone: n_groups}, seed=seed)
    params = replace(params, view_seed=seed, **changes)
    preprocessing = bench.preprocess(backbone)
    train, val = bench.load_images(preprocessing.interpolation)
    began = time.process_time()
    job = TrainingJob(
        model=bench.make_model(params),
        params=params,
        train=train,
        val=val,
        preprocessing=preprocessing,
        device=bench.device,
    )
    train_only(job)  # validated once, at the end: the numbers of train_epochs, sooner
    logits = predict_logits(job.model, val, preprocessing, job.device, precision=params.precision)
    scores = score_logits(logits, val.labels)
    seconds = round(time.process_time() - began, 2)
    return {"accuracy": scores.accuracy, "loss": scores.loss, "cpu_seconds": seconds}


def compare(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each data set, recipe and arm, means and differences to fresh views, where runs have their pair."""
    base = {_pair(run): run for run in runs if run["arm"] == BASELINE}
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        if _pair(run) in base:
            groups.setdefault((run["data"], run["recipe"]["unfrozen_layers"], run["arm"]), []).append(run)
    data_sets = dict.fromkeys(data for data, _, _ in groups)
    layers = dict.fromkeys(unfrozen for _, unfrozen, _ in groups)
    keys = (key for key in itertools.product(data_sets, layers, ARMS) if len(groups.get(key, ())) > 1)
    return [
        {"data": key[0], "unfrozen_layers": key[1], "arm": key[2], "n": len(groups[key])}
        | _compare_arm(groups[key], base)
        for key in keys
    ]


def _compare_arm(own: Sequence[Mapping[str, Any]], base: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    gains = [run["accuracy"] - base[_pair(run)]["accuracy"] for run in own]
    return {
        "accuracy": statistics.fmean(run["accuracy"] for run in own),
        "difference": statistics.fmean(gains),
        "standard_error": statistics.stdev(gains) / len(gains) ** 0.5,
        "loss_difference": statistics.fmean(run["loss"] - base[_pair(run)]["loss"] for run in own),
    }


def _pair(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return run["data"], json.dumps(run["recipe"]), run["seed"]


def choose_default(entries: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the number of views that follows from comparisons by the rule above; None: fresh views stay."""
    chosen = None
    numbered = [(changes["views"], arm) for arm, changes in ARMS.items() if isinstance(changes.get("views"), int)]
    for n_views, arm in sorted(numbered, reverse=True):
        own = [entry for entry in entries if entry["arm"] == arm and entry["unfrozen_layers"] != "all"]
        if not own or any(entry["difference"] < -max(MARGIN, entry["standard_error"]) for entry in own):
            break
        chosen = n_views
    return chosen


def describe_views(result: Mapping[str, Any]) -> str:
    """Return a result as the rows of the README's table, and what follows."""
    lines = [
        "| data | unfrozen layers | arm | trainings | val accuracy | against fresh, points | val loss against fresh |",
        "|" + "---|" * 7,
    ]
    entries = compare(result["runs"])
    for entry in entries:
        error = f" ± {100 * entry['standard_error']:.2f}" if entry["arm"] != BASELINE else ""
        lines.append(
            f"| {entry['data']} | {entry['unfrozen_layers']} | {entry['arm']} | {entry['n']} | "
            f"{entry['accuracy']:.4f} | {100 * entry['difference']:+.2f}{error} | {entry['loss_difference']:+.4f} |"
        )
    chosen = choose_default(entries)
    return "\n".join([*lines, f"default: {f'K = {chosen}' if chosen else 'fresh views, no K follows'}"])


def run_views(
    out: Path, *, n_seeds: int, smoke: bool, arms: Sequence[str] = tuple(ARMS), layers: Sequence[str] = LAYERS
) -> dict[str, Any]:
    """Run the trainings that a result file does not hold yet, and keep it after each.

    Args:
        out: The result file.
        n_seeds: From 0.
        smoke: Train tiny models on a few digits.
        arms: Of ``ARMS``.
        layers: Unfrozen layers of the recipes to train.

    Returns:
        The result, as it is on disk.
    """
    result: dict[str, Any] = {
        "case": NAME,
        "question": (__doc__ or "").splitlines()[0],
        "settings": {
            "backbone": _BACKBONE,
            "image_size": _SIZE,
            "epochs": _EPOCHS,
            "batch_size": _BATCH_SIZE,
            "augmentation_strength": _STRENGTH,
        },
        "provenance": [],
        "runs": [],
    }
    if out.exists():
        result = json.loads(out.read_text(encoding="utf-8"))
    result["provenance"].append(describe_provenance())
    has_real = not smoke and all(map(find_folder, (IMAGES_VARIABLE, WEIGHTS_VARIABLE)))
    done = {(*_pair(run), run["arm"]) for run in result["runs"]}
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name, empty_cache():
        benches = {}
        for images in REAL if has_real else (DIGITS,):
            place = Path(name, images.name)
            place.mkdir()
            benches[images.name] = open_bench(place, images, smoke=smoke)
        for run in _list_runs(list(benches), n_seeds):
            is_asked = run["arm"] in arms and str(run["recipe"]["unfrozen_layers"]) in layers
            if not is_asked or (*_pair(run), run["arm"]) in done:
                continue
            numbers = train_changed(benches[run["data"]], run["recipe"], ARMS[run["arm"]], run["seed"])
            result["runs"].append(run | numbers)
            result["summary"] = compare(result["runs"])
            result["default"] = choose_default(result["summary"])
            write_json(out, result)
    return result


def _list_runs(data: Sequence[str], n_seeds: int) -> Iterator[dict[str, Any]]:
    """Yield what to train: seed by seed, the arms of each recipe in an order of their own."""
    for seed in range(n_seeds):
        order = random.Random(seed)
        for name in data:
            for recipe in _RECIPES:
                for arm in order.sample(list(ARMS), len(ARMS)):
                    yield {"data": name, "recipe": recipe, "seed": seed, "arm": arm}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case to the command line."""
    options = parser.add_argument_group(NAME)
    options.add_argument("--views", type=names_of(ARMS), default=tuple(ARMS), metavar="K=8,fresh", help="arms to train")
    options.add_argument("--layers", type=names_of(LAYERS), default=LAYERS, metavar="1,2", help="of recipes to train")


def main(options: argparse.Namespace) -> None:
    """Run the case, print its table, and keep what was measured."""
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            print(describe_views(run_views(Path(folder, "result.json"), n_seeds=1, smoke=True)))
        return
    out = options.out or find_place(NAME, describe_provenance())
    if not options.describe:
        run_views(out, n_seeds=options.seeds, smoke=False, arms=options.views, layers=options.layers)
        print(f"kept in {out}")
    print(describe_views(json.loads(out.read_text(encoding="utf-8"))))
