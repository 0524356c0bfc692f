"""Tests of tuner.production.timm_recipe, against timm's own optimizer and scheduler."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import timm.scheduler
import yaml
from torch import nn

from tests.unit.training.builders import make_params
from tuner.production.timm_options import OPTIONS, check_options
from tuner.production.timm_recipe import TimmRecipe, express_recipe, write_args
from tuner.training.package import Manifest, read_package
from tuner.training.schedule import lr_factor
from tuner.trial import HeadStart

from .test_predictor import write_model

OPTIM: Any = timm.optim
SCHEDULER: Any = timm.scheduler
"""Any, since timm has types but does not say which of its names are public."""
RECIPES: list[dict[str, Any]] = [
    {},
    {"optimizer": "sgd", "momentum": 0.0},
    {"optimizer": "adam", "weight_decay": 0.05, "layer_decay": 0.7, "dropout": 0.2, "label_smoothing": 0.1},
    {"augmentation_strength": 0.5, "horizontal_flip": True, "views": 3, "class_weights": "balanced"},
    {"warmup_fraction": 0.3, "epochs": 10, "seed": 2**40},
]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Manifest]:
    """A model of timm and its manifest."""
    return read_package(write_model(tmp_path_factory.mktemp("recipe") / "model", backbone="test_vit", image_size=32))


def express(example: tuple[nn.Module, Manifest], **changes: Any) -> TimmRecipe:
    """Express the example's recipe with some params changed."""
    model, manifest = example
    return express_recipe(replace(manifest, params=replace(manifest.params, **changes)), model)


@pytest.mark.parametrize("changes", RECIPES)
def test_every_key_is_an_option_of_train_py(example: tuple[nn.Module, Manifest], changes: dict[str, Any]) -> None:
    """The script takes any key of a config file, and ignores those that it does not know."""
    assert express(example, **changes).values.keys() <= OPTIONS


@pytest.mark.parametrize("name", ["num-classes", "n_classes", "learning_rate", "crop_mode"])
def test_key_that_train_py_ignores_is_caught(name: str) -> None:
    """A misspelt key would silently mean the script's default."""
    with pytest.raises(ValueError, match=f"must know every key, got {name}$"):
        check_options(["model", name])


@pytest.mark.parametrize("changes", RECIPES)
def test_file_holds_the_values_in_their_types(
    tmp_path: Path, example: tuple[nn.Module, Manifest], changes: dict[str, Any]
) -> None:
    """YAML 1.1 reads 1e-05 as text; what is not expressed is a comment."""
    recipe = express(example, lr=1e-5, **changes)
    write_args(tmp_path / "args.yaml", recipe)
    text = (tmp_path / "args.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == {
        name: list(value) if isinstance(value, tuple) else value for name, value in recipe.values.items()
    }
    assert [line.removeprefix("# - ") for line in text.splitlines() if line.startswith("# - ")] == list(recipe.notes)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"unfrozen_layers": 1}, "unfrozen_layers = 1 of "),
        ({"augmentation_strength": 0.5}, "augmentation_strength = 0.5"),
        ({"augmentation_strength": 0.5, "views": 3}, "views = 3"),
        ({"class_weights": "balanced"}, "class_weights = balanced"),
        ({"head_start": HeadStart.take_from(make_params())}, "head_start: it trains all layers from a new head"),
        ({"layer_decay": 0.5}, "layer_decay by layer groups"),
        ({"warmup_fraction": 0.25, "epochs": 6}, "a warm-up of 1.5 epochs"),
        ({"dropout": 0.5}, "dropout in front of the head alone"),
        ({"weight_decay": 0.1}, "weight decay of the backbone's embeddings"),
    ],
)
def test_what_train_py_cannot_express_is_said(
    example: tuple[nn.Module, Manifest], changes: dict[str, Any], note: str
) -> None:
    """Each of them is noted if the recipe has it, and only then."""
    plain = {"unfrozen_layers": 99, "warmup_fraction": 0.0}
    assert any(said.startswith(note) for said in express(example, **plain | changes).notes)
    assert not any(said.startswith(note) for said in express(example, **plain).notes)


@pytest.mark.parametrize(("warmup_fraction", "n_warmup"), [(0.0, 0), (0.2, 2)])
def test_learning_rates_are_those_of_the_recipe(
    example: tuple[nn.Module, Manifest], warmup_fraction: float, n_warmup: int
) -> None:
    """The scheduler of timm, moved on per step as train.py does, gives our cosine; the warm-up is one step behind."""
    n_batches = 7
    values = express(example, lr=0.5, epochs=10, warmup_fraction=warmup_fraction).values
    optimizer = make_optimizer(example[0], values)
    names = {"sched", "epochs", "min_lr", "warmup_lr", "warmup_epochs", "warmup_prefix", "cooldown_epochs"}
    chosen = {name: value for name, value in values.items() if name in names}
    scheduler, n_epochs = SCHEDULER.create_scheduler_v2(
        optimizer,
        num_epochs=chosen.pop("epochs"),
        step_on_epochs=not values["sched_on_updates"],
        updates_per_epoch=n_batches,
        **chosen,
    )
    assert n_epochs == 10
    for step in range(10 * n_batches):
        scheduler.step_update(num_updates=step)
        shift = 1 if step < n_warmup * n_batches else 0
        wanted = lr_factor(step, 10 * n_batches, warmup_fraction)
        tolerance = 1.0 / (n_warmup * n_batches) if shift else 1e-9
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * wanted, abs=0.5 * tolerance)


def make_optimizer(model: nn.Module, values: dict[str, Any]) -> Any:
    """Make timm's optimizer from the values, as train.py does."""
    given = Namespace(**values)
    extra = {"betas": given.opt_betas} if "opt_betas" in values else {}
    return OPTIM.create_optimizer_v2(
        model,
        opt=given.opt,
        lr=given.lr,
        weight_decay=given.weight_decay,
        momentum=values.get("momentum", 0.9),
        **extra,
    )


@pytest.mark.parametrize(
    ("changes", "kind", "wanted"),
    [
        ({"optimizer": "adamw", "momentum": 0.8}, "AdamW", {"betas": (0.8, 0.999)}),
        ({"optimizer": "adam", "momentum": 0.8}, "Adam", {"betas": (0.8, 0.999)}),
        ({"optimizer": "sgd", "momentum": 0.8}, "SGD", {"momentum": 0.8, "nesterov": True}),
        ({"optimizer": "sgd", "momentum": 0.0}, "SGD", {"momentum": 0.0, "nesterov": False}),
    ],
)
def test_optimizer_is_that_of_the_recipe(
    example: tuple[nn.Module, Manifest], changes: dict[str, Any], kind: str, wanted: dict[str, Any]
) -> None:
    """The name of timm for each of our optimizers is the one that torch's is made by."""
    optimizer = make_optimizer(example[0], express(example, lr=0.1, weight_decay=0.01, **changes).values)
    assert type(optimizer).__name__ == kind
    for group in optimizer.param_groups:
        assert group["lr"] == 0.1
        assert wanted.items() <= group.items()
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.01}


def test_images_of_fixed_size_models_keep_their_size(example: tuple[nn.Module, Manifest]) -> None:
    """train.py makes the model without ``img_size``, which only sets its images'; a ViT would be built for others."""
    values = express(example).values
    assert values["model_kwargs"] == {"img_size": 32}
    assert values["img_size"] == 32


def test_seed_is_one_that_numpy_takes(example: tuple[nn.Module, Manifest]) -> None:
    """Trials have seeds of 63 bits, on which train.py would stop."""
    assert express(example, seed=2**40 + 7).values["seed"] == 7


@pytest.mark.parametrize(
    ("precision", "provenance", "is_rounded"),
    [
        ("auto", {"device": "cpu"}, False),
        ("auto", {"device": "cuda:0"}, True),
        ("auto", {"device": "cuda:0", "computed_in": "float32"}, False),
        ("float32", {"device": "cuda:0"}, False),
        ("bfloat16", {"device": "cpu"}, True),
    ],
)
def test_precision_is_that_of_the_training(
    example: tuple[nn.Module, Manifest], precision: str, provenance: dict[str, str], is_rounded: bool
) -> None:
    """By default what the device that trained the model computed in."""
    model, manifest = example
    manifest = replace(manifest, provenance={**manifest.provenance, **provenance})
    values = express((model, manifest), precision=precision).values
    assert (values.get("amp_dtype") == "bfloat16") is is_rounded
