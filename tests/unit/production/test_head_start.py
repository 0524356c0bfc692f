"""Production obeys a recipe that starts from a trained head: best, train, card and verify."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.test_head_training import Desk
from tuner.data.image_set import load_image_set
from tuner.data.index import Split
from tuner.production.best import best_params, write_toml
from tuner.production.model_card import read_card
from tuner.production.reading import read_trial
from tuner.production.retrain import train_best
from tuner.production.verifying import train_from_card
from tuner.service.messages import Train
from tuner.service.study_data import read_study_data
from tuner.service.training_session import TrainingSession
from tuner.service.workbench import Workbench
from tuner.spec.sections import StudySpec
from tuner.training.head_start import train_head
from tuner.training.loop import TrainingJob, train_only
from tuner.training.package import read_manifest
from tuner.training.prepare import prepare_model
from tuner.trial import HeadStart, Repeat, TrialParams

from .builders import SMALL_CNN, make_spec, store_study, write_images
from .test_model_card import confirm

SPACE: dict[str, Any] = {"lr": {"low": 1e-3, "high": 1e-2, "log": True}, "unfrozen_layers": {"low": 1, "high": 3}}


@pytest.fixture(autouse=True)
def _use_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def spec(tmp_path: Path) -> StudySpec:
    """A study with a screen of one head, whose deeper trials start from it."""
    write_images(tmp_path / "images")
    return make_spec(
        tmp_path,
        space=SPACE,
        training={
            "backbone": SMALL_CNN,
            "batch_size": 8,
            "epochs": 3,
            "horizontal_flip": False,
            "head_start": "screen",
        },
        search={"screen": 1},
    )


@pytest.fixture
def url(tmp_path: Path, spec: StudySpec) -> str:
    """The study's database: a head, then a better deeper trial."""
    return store_study(tmp_path, spec, accuracies=(0.5, 0.75))


def read_params(url: str) -> TrialParams:
    """Return the recipe of the best trial, which starts from a head."""
    tables = best_params("sides", storage=url)
    params = TrialParams.from_json(tables["params"])
    assert (tables["trial"]["number"], params.unfrozen_layers > 1) == (1, True)
    assert params.head_start is not None
    return params


def test_best_tells_the_heads_recipe(url: str) -> None:
    """In JSON and as a table of TOML, from which the same recipe comes back; the trial tells it too."""
    params = read_params(url)
    tables = tomllib.loads(write_toml(best_params("sides", storage=url)))
    assert TrialParams.from_json(tables["params"]) == params
    head = read_trial("sides", 0, url)["recipe"]
    assert params.head_recipe == TrialParams.from_json(head)
    assert read_trial("sides", 1, url)["recipe"]["head_start"]["seed"] == head["seed"]


def test_train_best_trains_the_head_first(tmp_path: Path, spec: StudySpec, url: str) -> None:
    """On train + val, then everything: the folder's weights are those of doing it by hand, not those without."""
    params, told = read_params(url), list[str]()
    train_best("sides", tmp_path / "out", storage=url, device="cpu", announce=told.append)
    assert [line.partition(":")[0] for line in told if "the head alone" in line] == [
        f"the head alone, epoch {epoch} of 3" for epoch in (1, 2, 3)
    ] * 2
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert same(found, train_by_hand(spec, params))
    assert not same(found, train_by_hand(spec, replace(params, head_start=None)))
    assert read_manifest(tmp_path / "out").params == params
    card = read_card(tmp_path / "out")
    assert TrialParams.from_json(card["recipe"]) == params
    assert "- head_start = {'lr':" in (tmp_path / "out" / "model_card.md").read_text(encoding="utf-8")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states agree in every bit."""
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def train_by_hand(spec: StudySpec, params: TrialParams) -> dict[str, torch.Tensor]:
    """Return the weights after training on train and val, the head first."""
    data = read_study_data(spec)
    which = (Split.TRAIN, Split.VAL)
    bench = Workbench(spec, data, device="cpu", n_threads=1, note=print)
    preprocessing = bench.preprocess(params.backbone)
    images = load_image_set(data.index, data.splits, spec.data, which, interpolation=preprocessing.interpolation)
    job = TrainingJob(
        model=prepare_model(params, spec, 2, None),
        params=params,
        train=images,
        val=None,
        preprocessing=preprocessing,
        device=torch.device("cpu"),
    )
    train_head(job)
    train_only(job)
    return job.model.state_dict()


def test_verify_repeats_the_confirmation_from_the_head_on(tmp_path: Path, spec: StudySpec, url: str) -> None:
    """The card alone gives the worker's numbers; without the head, or with the search's own head, it gives others."""
    confirm(url, 1)
    train_best("sides", tmp_path / "out", storage=url, device="cpu")
    card = read_card(tmp_path / "out")
    params = replace(TrialParams.from_json(card["recipe"]), views="fresh")
    repeat = Repeat(**card["confirmation"]["runs"][0]["repeat"])
    desk = Desk()
    session = TrainingSession(Workbench(spec, read_study_data(spec), device="cpu", n_threads=1, note=print), desk)
    asked = params.with_seed(repeat.seed)
    session.train(Train(data_hash="", members=((0, asked),), uses_features=False, repeats=(repeat,)))
    (run,) = train_from_card(card, "cpu", 1)
    assert run["loss"] == desk.curve(0)[-1].val_loss
    without = {name: value for name, value in card["recipe"].items() if name != "head_start"}
    other = HeadStart(**card["recipe"]["head_start"] | {"lr": 0.5})
    for recipe in (without, replace(params, head_start=other).to_json()):
        (changed,) = train_from_card(json.loads(json.dumps(card | {"recipe": recipe})), "cpu", 1)
        assert changed["loss"] != run["loss"]
