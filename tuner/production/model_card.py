"""The model card: what a model is, where it comes from, what it is worth, and all that it takes to train it again."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuner.errors import ExportError, ModelError
from tuner.production.stored_recipe import StoredRecipe
from tuner.search.confirmation import make_repeat
from tuner.spec.durations import format_seconds
from tuner.spec.printable import as_printable

CARD_NAME = "model_card.json"
CARD_TEXT_NAME = "model_card.md"
_FORMAT = 1


def make_card(
    recipe: StoredRecipe,
    *,
    training: dict[str, Any],
    versions: dict[str, str],
    test: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return a model card as a JSON object.

    Args:
        recipe: Of the model, with its study.
        training: How the model of the folder was trained.
        versions: Of the packages that trained it.
        test: What the look at test showed; None without a test split.
    """
    facts = recipe.facts
    return {
        "format": _FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": recipe.tables["params"],
        "backbone": recipe.tables["backbone"],
        "weights": facts.weights[recipe.params.backbone],
        "preprocessing": recipe.tables["data"],
        "data": {
            "hash": facts.data_hash,
            "counts": facts.split_counts,
            "classes": list(facts.classes),
            "splits": facts.splits,
        },
        "study_file": json.loads(recipe.spec.model_copy(update={"enqueue": ()}).model_dump_json()),
        "search": {
            "study": recipe.study,
            "trial": recipe.number,
            "objective": recipe.spec.study.objective,
            "value": recipe.value,
            "micro_batch": recipe.micro_batch,
            "n_trials": recipe.n_trials,
            "device_seconds": recipe.ledger.to_json(),
        },
        "confirmation": _describe_confirmation(recipe),
        "training": training,
        "versions": versions,
        "test": test,
        "limits": list_limits(recipe, has_test=test is not None),
    }


def _describe_confirmation(recipe: StoredRecipe) -> dict[str, Any] | None:
    """Return what the recipe showed on fresh seeds, and how to show it again; None if it is not the confirmed best."""
    found = recipe.confirmation
    if found is None or found.winner.trial != recipe.number:
        return None
    winner = found.winner
    runs = [
        {
            "repeat": vars(make_repeat(recipe.spec.study.seed, seed, found.n_folds)),
            "value": value,
            "accuracy": accuracy,
            "loss": loss,
        }
        for seed, value, accuracy, loss in zip(
            winner.seeds, winner.values, winner.accuracies, winner.losses, strict=True
        )
    ]
    return {
        "value": winner.mean,
        "standard_deviation": winner.deviation,
        "gain_over_search": found.gain,
        "accuracy": found.prediction.accuracy,
        "accuracy_interval_95": [found.prediction.low, found.prediction.high],
        "n_test_images_of_interval": found.prediction.n_test,
        "n_failed_seeds": winner.n_failed,
        "runs": runs,
    }


def list_limits(recipe: StoredRecipe, *, has_test: bool) -> list[str]:
    """Return what the numbers of a card do not say, a sentence each."""
    limits = [
        "The numbers hold for images drawn as the study's were; another camera, place or time may give others.",
        "Each image is taken to be of one of the classes; what is none of them gets a class all the same.",
    ]
    if recipe.confirmation is None or recipe.confirmation.winner.trial != recipe.number:
        limits.append("The recipe was not confirmed on fresh seeds: the search's number is the best of many, too good.")
    elif recipe.confirmation.n_folds == 0:
        limits.append("It was confirmed on the val images that the search has chosen by, since the data gives val.")
    if recipe.confirmation is not None and recipe.confirmation.n_search_trials < recipe.n_completed:
        limits.append("The search has gone on since the confirmation; what it found since then was not confirmed.")
    if not has_test:
        limits.append("There was no test split: no number here is from images that no choice was based on.")
    if recipe.spec.pretraining is None:
        limits.append("What the backbone's own pretraining has seen is not known; test images may have been among it.")
    return limits


def read_card(folder: Path) -> dict[str, Any]:
    """Read the card of a model folder.

    Raises:
        ExportError: If there is none.
        ModelError: If it is none of ours.
    """
    path = folder / CARD_NAME
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(
            f"{folder}: must be a model folder with a {CARD_NAME}, got none; 'tuner train' writes one"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: must be a model card that 'tuner train' wrote, got: {error}") from error
    if not isinstance(card, dict) or card.get("format") != _FORMAT:
        raise ModelError(f"{path}: must be a model card of format {_FORMAT}; 'tuner train' writes one")
    return card


@contextmanager
def explain_card(where: str) -> Iterator[None]:
    """Turn what a block raises over a card that nothing of ours wrote into one line.

    Raises:
        ModelError: In place of it.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{where}: must hold a model card that 'tuner train' wrote, got {type(error).__name__}: {reason}"
        ) from error


def write_card_text(card: dict[str, Any]) -> str:
    """Return a card as Markdown, for people."""
    search, data, training = card["search"], card["data"], card["training"]
    counts = ", ".join(f"{count} {split}" for split, count in data["counts"].items())
    cost = search["device_seconds"]
    sections = {
        "What it is": [
            f"{_plain(card['recipe']['backbone'])} for {len(data['classes'])} classes: "
            + ", ".join(map(_plain, data["classes"][:20]))
            + (" …" if len(data["classes"]) > 20 else ""),
            (
                f"Trained on {training['trained_on']}, {training['n_images']} images, on {training['device']} "
                f"({card['date'][:10]}), seed {training['seeds'][0]}"
            ),
        ],
        "What it is worth": _tell_worth(card),
        "Recipe": [f"{name} = {_plain(value)}" for name, value in card["recipe"].items()],
        "Data": [
            f"images: {counts}",
            f"hash `{data['hash']}`",
            (
                f"val and test are cut by the study's seed "
                f"{card['study_file']['study']['seed']} where the data does not give them"
            ),
        ],
        "Search": [
            (
                f"study {_plain(search['study'])}, trial {search['trial']} of {search['n_trials']}: "
                f"{search['objective']} {search['value']:.4f}"
            ),
            f"{format_seconds(cost['held'])} of devices, {format_seconds(cost['wall'])} on the clock",
        ],
        "Software": [f"{_plain(name)} {_plain(version)}" for name, version in card["versions"].items()],
        "Limits": card["limits"],
    }
    parts = ["# Model card", *(_write_section(title, items) for title, items in sections.items())]
    return "\n\n".join(parts) + "\n\n`tuner verify` trains it again from `model_card.json` alone.\n"


def _tell_worth(card: dict[str, Any]) -> list[str]:
    items = []
    if (confirmed := card["confirmation"]) is not None:
        low, high = confirmed["accuracy_interval_95"]
        objective, n_runs = card["search"]["objective"], len(confirmed["runs"])
        items += [
            f"confirmed {objective} {confirmed['value']:.4f} ± {confirmed['standard_deviation']:.4f}",
            f"that is the mean of {n_runs} fresh seeds",
            f"against the search: {confirmed['gain_over_search']:+.4f}",
            f"predicted accuracy in production: 95 % {low:.4f} to {high:.4f}",
        ]
    if (test := card["test"]) is None:
        return [*items, "no test split: no unbiased number"]
    low, high = test["accuracy_interval_95"]
    calibrated = test["calibration"]["calibrated"]
    return [
        *items,
        f"test accuracy {test['accuracy']:.4f} (95 % {low:.4f} to {high:.4f}, {test['n_images']} images)",
        f"test balanced accuracy {test['balanced_accuracy']:.4f}, macro F1 {test['macro_f1']:.4f}",
        f"test calibration error {calibrated['ece']:.4f} at temperature {test['temperature']:.3g}",
    ]


def _write_section(title: str, items: list[str]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {as_printable(item)}" for item in items)])


def _plain(value: Any) -> str:
    """Return a value in which nothing is Markdown."""
    return "".join(f"\\{each}" if each in r"\`*_~&[]<>|#" else each for each in str(value))
