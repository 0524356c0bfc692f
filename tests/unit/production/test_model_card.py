"""The card says what is known and what is not, in JSON and in Markdown, and a forged one is one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from tuner.errors import DataError, ExportError, ModelError
from tuner.production.best import best_params
from tuner.production.model_card import CARD_NAME, read_card, write_card_text
from tuner.production.retrain import train_best
from tuner.production.stored_recipe import expect_test, read_recipe
from tuner.production.verifying import train_from_card, verify_folder
from tuner.search.confirmation import CONFIRMATION_ATTR, Wanted, summarise
from tuner.search.storage import use_storage
from tuner.search.studies import load_stored, open_study
from tuner.search.trial_attrs import is_confirmation
from tuner.search.trial_book import TrialBook
from tuner.trial import TrialOutcome, TrialState

from .builders import SMALL_CNN, make_epoch, set_trial_attr, store_example


@pytest.fixture(autouse=True)
def _use_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))


def confirm(url: str, trial: int, values: tuple[float, ...] = (0.7, 0.8)) -> None:
    """Store a made-up confirmation of one trial."""
    with use_storage(url) as storage:
        stored = load_stored(storage, "sides")
        stored = open_study(storage, stored.spec, stored.facts)
        book = TrialBook(stored)
        for seed, value in enumerate(values):
            number, params = book.ask_confirmation(Wanted(trial=trial, seed=seed), 0)
            for epoch in range(1, params.epochs + 1):
                book.report(number, make_epoch(epoch, value))
            book.tell(number, TrialOutcome(state=TrialState.COMPLETE))
        book.flush()
        found = summarise(stored, (trial,), len(values))
        assert found is not None
        stored.study.set_user_attr(CONFIRMATION_ATTR, found.to_json())


def train_card(folder: Path, *, is_confirmed: bool = True, **overrides: Any) -> dict[str, Any]:
    """Train a model and return its card."""
    url = store_example(folder, **overrides)
    if is_confirmed:
        confirm(url, 0)
    train_best("sides", folder / "model", storage=url, device="cpu")
    return read_card(folder / "model")


def test_card_of_a_confirmed_recipe_says_how_to_confirm_it_again(tmp_path: Path) -> None:
    """Seeds, cuts and what they showed; hours, versions, splits and limits; all of it again in words."""
    card = train_card(tmp_path)
    assert [run["accuracy"] for run in card["confirmation"]["runs"]] == [0.7, 0.8]
    assert card["confirmation"]["value"] == pytest.approx(0.75)
    assert card["data"]["counts"] == {"train": 22, "val": 8, "test": 10}
    assert card["training"]["seeds"] == [card["recipe"]["seed"]]
    assert any("val images that the search has chosen by" in limit for limit in card["limits"])
    text = (tmp_path / "model" / "model_card.md").read_text(encoding="utf-8")
    assert "- confirmed val_accuracy 0.7500 ± 0.0707" in text
    assert f"- hash `{card['data']['hash']}`" in text


def test_card_says_that_nothing_was_confirmed(tmp_path: Path) -> None:
    """The search's number alone is too good; verify has nothing to go by."""
    card = train_card(tmp_path, is_confirmed=False, test_fraction=None)
    assert card["confirmation"] is None
    assert any("not confirmed on fresh seeds" in limit for limit in card["limits"])
    assert any("no test split" in limit for limit in card["limits"])
    with pytest.raises(ExportError, match="must hold the model of a confirmed recipe, got one that was not"):
        verify_folder(tmp_path / "model", device="cpu")


def test_card_says_that_the_search_went_on(tmp_path: Path) -> None:
    """What was found since the confirmation was not confirmed."""
    url = store_example(tmp_path, accuracies=(0.75, 0.5))
    confirm(url, 0)
    with use_storage(url) as storage:
        study = load_stored(storage, "sides").study
        study.set_user_attr(CONFIRMATION_ATTR, study.user_attrs[CONFIRMATION_ATTR] | {"n_search_trials": 1})
    train_best("sides", tmp_path / "model", storage=url, device="cpu")
    assert any("has gone on since the confirmation" in limit for limit in read_card(tmp_path / "model")["limits"])


def test_production_trains_what_was_confirmed(tmp_path: Path) -> None:
    """Fixed views are how a search saves time; confirmed, and so retrained, are fresh ones."""
    fixed = {"backbone": SMALL_CNN, "batch_size": 8, "unfrozen_layers": 2, "epochs": 3, "views": 4}
    url = store_example(tmp_path, training=fixed)
    assert best_params("sides", storage=url)["params"]["views"] == 4
    confirm(url, 0)
    assert best_params("sides", storage=url)["params"]["views"] == "fresh"
    with pytest.raises(ExportError, match=r"trial 2 must be one of the search, got one that confirms trial 0"):
        best_params("sides", storage=url, trial=2)


def test_prediction_is_for_the_test_images_that_there_are(tmp_path: Path) -> None:
    """Some data sets list them only when test is opened; more images make the interval narrower."""
    url = store_example(tmp_path)
    confirm(url, 0, (0.75, 0.75))
    recipe = read_recipe("sides", url)
    assert expect_test(recipe, 10) is recipe
    few, many = (expect_test(recipe, n_test).tables["confirmed"]["accuracy_interval_95"][0] for n_test in (2, 10_000))
    assert few < recipe.tables["confirmed"]["accuracy_interval_95"][0] < many


def test_forged_card_is_one_line(tmp_path: Path) -> None:
    """Whatever stands in it, in this process or in the one that trains."""
    card = train_card(tmp_path)
    forged: list[Any] = [
        {"format": 1},
        card | {"recipe": {}},
        card | {"study_file": None},
        card | {"confirmation": {"runs": [], "accuracy_interval_95": "wide"}},
        card | {"confirmation": {"runs": [], "accuracy_interval_95": [0.5, 0.9]}},
        [],
    ]
    for each in forged:
        (tmp_path / "model" / CARD_NAME).write_text(json.dumps(each), encoding="utf-8")
        with pytest.raises(ModelError, match=r"must (be|hold) a model card"):
            verify_folder(tmp_path / "model", device="cpu")


def test_verify_wants_the_images_of_the_card(tmp_path: Path) -> None:
    """Another split is other data, said before anything is trained."""
    card = train_card(tmp_path)
    card["study_file"]["study"]["seed"] += 1
    (tmp_path / "model" / CARD_NAME).write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(DataError, match=r"^data: must be the images of the model card, got other images"):
        verify_folder(tmp_path / "model", device="cpu")


def test_names_are_no_markdown(tmp_path: Path) -> None:
    """A class may be called anything."""
    card = train_card(tmp_path)
    card["data"]["classes"] = ["<script>", "__init__", "[a](b)", "&lt;", "x\x1b[2J"]
    text = write_card_text(card)
    assert r"\<script\>, \_\_init\_\_, \[a\](b), \&lt;, x" in text
    assert "\x1b" not in text


def test_verify_takes_batches_in_the_smallest_parts_of_the_trial_and_its_confirmations(tmp_path: Path) -> None:
    """A trial on kept maps may fit whole, and still the whole models that confirm it did not."""
    training = {"backbone": SMALL_CNN, "batch_size": 8, "unfrozen_layers": 1, "augmentation_strength": 0.0, "epochs": 2}
    url = store_example(tmp_path, training=training)
    confirm(url, 0)
    with use_storage(url) as storage:
        confirming = [each.number for each in load_stored(storage, "sides").study.trials if is_confirmation(each)]
    for number, micro_batch in zip(confirming, (4, 3), strict=True):
        set_trial_attr(url, "micro_batch", micro_batch, number=number)
    assert best_params("sides", storage=url)["trial"]["micro_batch"] == 3
    train_best("sides", tmp_path / "model", storage=url, device="cpu")
    card = read_card(tmp_path / "model")
    assert card["search"]["micro_batch"] == 3
    seen: list[int] = []

    def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if module.training:
            seen.append(len(inputs[0]))

    with register_module_forward_pre_hook(watch):
        train_from_card(card, "cpu", 1)
    assert max(seen) == 3
    with pytest.raises(ModelError, match="micro_batch"):
        train_from_card({**card, "search": {**card["search"], "micro_batch": 9}}, "cpu", 1)
