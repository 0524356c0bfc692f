"""Train a model card's recipe again, from the card alone, in a process of its own, and compare with what it says.

``python -m tuner.production.verifying CARD RESULT DEVICE N_RUNS`` trains; ``verify_folder`` starts that in an empty
folder. The trainings are those that confirmed the recipe: their seeds and cuts, which never touch test.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tuner.data.folds import cut_fold
from tuner.data.image_set import ImageSet, load_image_set, move_to
from tuner.data.index import Split
from tuner.errors import ERRORS_BY_NAME, DataError, ExportError, ModelError, TunerError
from tuner.models.backbone import read_preprocessing
from tuner.models.weights import find_weights
from tuner.production.machine import choose_device, reporting_memory, using_cores
from tuner.production.model_card import CARD_NAME, explain_card, read_card
from tuner.service.study_data import StudyData, read_study_data
from tuner.spec.own_code import check_code
from tuner.spec.sections import BackboneSection, StudySpec
from tuner.training.epoch_numbers import Diverged
from tuner.training.head_start import train_head
from tuner.training.loop import TrainingJob, train_epochs
from tuner.training.prepare import keeps_head, prepare_model
from tuner.training.pretrain import identify_pretraining, pretrain_backbone
from tuner.trial import Repeat, TrialParams

LOSS_TOLERANCE = 0.25
"""How far, of itself, the mean validation loss of the same trainings may be off: other devices round otherwise."""
_LEAST_TOLERANCE = 0.01
"""Of a loss near 0, in nats."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What training from a card again has shown."""

    accuracy: float
    """Mean of the trainings."""
    loss: float
    """Mean validation loss, in nats; infinite if one diverged."""
    interval: tuple[float, float]
    """In which the card predicts the accuracy."""
    card_accuracy: float
    """Of the same trainings, in the card."""
    card_loss: float
    n_runs: int

    @property
    def is_in_interval(self) -> bool:
        """Whether the accuracy is what the card predicts."""
        return self.interval[0] <= self.accuracy <= self.interval[1]

    @property
    def is_same_loss(self) -> bool:
        """Whether the loss is the card's, but for rounding."""
        allowed = max(_LEAST_TOLERANCE, LOSS_TOLERANCE * self.card_loss)
        return abs(self.loss - self.card_loss) <= allowed

    @property
    def is_verified(self) -> bool:
        """Whether the card holds."""
        return self.is_in_interval and self.is_same_loss

    def to_json(self) -> dict[str, Any]:
        """Return the verification as a JSON object."""
        loss = self.loss if math.isfinite(self.loss) else None
        checks = {"is_in_interval": self.is_in_interval, "is_same_loss": self.is_same_loss}
        return asdict(self) | checks | {"loss": loss, "is_verified": self.is_verified}


def verify_folder(
    folder: str | Path, *, device: str = "auto", n_runs: int | None = None, allow_code: bool = False
) -> Verification:
    """Train a model folder's recipe again from its card alone, in an empty folder and a new process.

    Args:
        folder: What ``tuner train`` wrote.
        device: ``auto``, ``cpu`` or ``cuda:N``.
        n_runs: Of the trainings that confirmed the recipe, the first so many; default: all.
        allow_code: Whether a backbone that is a user's function may be imported and called.

    Raises:
        ExportError: If there is no model card, or its recipe was not confirmed.
        ModelError: If the card or the weights cannot be used, or code is not allowed.
        DataError: If the images are not the card's.
        DeviceError, StorageError: If the device or the cache cannot be used.
    """
    card = read_card(Path(folder))
    choose_device(device)
    with explain_card(str(folder)):
        backbone = str(card["recipe"]["backbone"])
        confirmation = card["confirmation"]
    check_code(backbone, allow_code=allow_code, where=str(folder), kind="folder")
    if confirmation is None:
        raise ExportError(
            f"{folder}: must hold the model of a confirmed recipe, got one that was not; 'tuner confirm', then "
            f"'tuner train' writes one"
        )
    with explain_card(str(folder)):
        low, high = map(float, confirmation["accuracy_interval_95"])
        recorded = [(float(run["accuracy"]), float(run["loss"])) for run in confirmation["runs"]][:n_runs]
        if not recorded:
            raise ValueError("confirmation.runs must hold a training, got none")
    with TemporaryDirectory(prefix="tuner-verify-") as name:
        place = Path(name)
        (place / CARD_NAME).write_text(json.dumps(card), encoding="utf-8")
        runs = _train_apart(place, device, len(recorded), allow_code=allow_code)
    return Verification(
        accuracy=fmean(run["accuracy"] for run in runs),
        loss=fmean(math.inf if run["loss"] is None else run["loss"] for run in runs),
        interval=(low, high),
        card_accuracy=fmean(accuracy for accuracy, _ in recorded),
        card_loss=fmean(loss for _, loss in recorded),
        n_runs=len(runs),
    )


def _train_apart(place: Path, device: str, n_runs: int, *, allow_code: bool) -> list[dict[str, Any]]:
    """Train in a new process; return the accuracy and the loss of each training."""
    result = place / "result.json"
    command = [sys.executable, "-P", "-m", "tuner.production.verifying", CARD_NAME, str(result), device, str(n_runs)]
    # Only a user's function needs the folder where it lies.
    environment = dict(os.environ) | ({"TUNER_VERIFY_CODE": str(Path.cwd())} if allow_code else {})
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    if not result.is_file():
        raise RuntimeError(f"the process that verifies met a bug (exit code {done.returncode}):\n{done.stderr}")
    found = json.loads(result.read_text(encoding="utf-8"))
    if "error" in found:
        raise ERRORS_BY_NAME[found["error"]](found["message"])
    runs: list[dict[str, Any]] = found["runs"]
    return runs


def train_from_card(card: dict[str, Any], device: str, n_runs: int) -> list[dict[str, Any]]:
    """Repeat the first trainings that confirmed a card's recipe.

    Returns:
        ``accuracy`` and ``loss`` of each; a loss of None if it diverged.

    Raises:
        DataError, ModelError, DeviceError, StorageError: If something of the card cannot be used.
    """
    with explain_card(CARD_NAME):
        spec = StudySpec.model_validate(card["study_file"], strict=False)
        params = replace(TrialParams.from_json(card["recipe"]), views="fresh")
        repeats = [Repeat(**run["repeat"]) for run in card["confirmation"]["runs"][:n_runs]]
        data_hash, weights = card["data"]["hash"], card["weights"]
        micro_batch = _read_micro_batch(card, params)
    data = read_study_data(spec)
    if data.hash != data_hash:
        raise DataError("data: must be the images of the model card, got other images, labels or splits; restore them")
    chosen = choose_device(device)
    pretrained = _find_weights(params.backbone, spec, weights, chosen)
    preprocessing = read_preprocessing(params.backbone, spec.backbones.get(params.backbone, BackboneSection()))
    runs = []
    with (
        using_cores() as n_threads,
        reporting_memory(chosen, n_images=micro_batch or params.batch_size, advice="choose another --device"),
    ):
        load = partial(
            load_image_set,
            data.index,
            data.splits,
            spec.data,
            interpolation=preprocessing.interpolation,
            n_threads=n_threads,
        )
        for repeat in repeats:
            own = params.with_seed(repeat.seed)
            train, val = _cut_images(load, repeat, data)
            job = TrainingJob(
                model=prepare_model(own, spec, len(data.index.classes), pretrained),
                params=own,
                train=move_to(train, chosen),
                val=move_to(val, chosen),
                preprocessing=preprocessing,
                device=chosen,
                micro_batch=micro_batch,
            )
            runs.append(_train_run(job, keep_head=keeps_head(spec, params.backbone)))
    return runs


def _cut_images(
    load: Callable[[tuple[Split, ...]], ImageSet], repeat: Repeat, data: StudyData
) -> tuple[ImageSet, ImageSet]:
    """Return the images that train and those that validate in one of a card's trainings."""
    if repeat.n_folds:
        return cut_fold(load((Split.TRAIN, Split.VAL)), repeat, data.index)
    return load((Split.TRAIN,)), load((Split.VAL,))


def _read_micro_batch(card: dict[str, Any], params: TrialParams) -> int | None:
    """Return how many images a card's recipe takes at a time; None for whole batches, as in cards of before."""
    found = card["search"].get("micro_batch")
    if found is not None and not 1 <= int(found) <= params.batch_size:
        raise ValueError(f"search.micro_batch must lie in [1, {params.batch_size}], got {found}")
    return None if found is None else int(found)


def _find_weights(backbone: str, spec: StudySpec, wanted: str, device: torch.device) -> Path | None:
    """Check that the backbone starts from the card's weights; return those of pretraining, if there are some.

    Raises:
        ModelError: If they are others.
    """
    if spec.pretraining is None:
        path, found = None, find_weights(backbone, spec.backbones.get(backbone, BackboneSection())).fingerprint
    else:
        path, found = pretrain_backbone(backbone, spec, device), identify_pretraining(backbone, spec)
    if found != wanted:
        raise ModelError(f'backbones."{backbone}".weights: must be those of the model card, got others')
    return path


def _train_run(job: TrainingJob, *, keep_head: bool) -> dict[str, Any]:
    try:
        train_head(job, keep_head=keep_head)
        for result, _ in train_epochs(job):
            last = result
    except Diverged:
        return {"accuracy": 0.0, "loss": None}
    return {"accuracy": last.val_accuracy, "loss": last.val_loss}


def describe_verification(found: Verification) -> str:
    """Return a verification for a person."""
    low, high = found.interval
    place = "in" if found.is_in_interval else "NOT in"
    loss = "the same" if found.is_same_loss else "NOT the same"
    return "\n".join(
        [
            (
                f"trained {found.n_runs} times from the card: accuracy {found.accuracy:.4f}, in the card "
                f"{found.card_accuracy:.4f}: {place} the predicted interval {low:.4f} to {high:.4f}"
            ),
            f"validation loss {found.loss:.4f}, in the card {found.card_loss:.4f}: {loss}, within {LOSS_TOLERANCE:.0%}",
            "verified" if found.is_verified else "NOT verified: the card's recipe does not give the card's model",
        ]
    )


def main(arguments: list[str]) -> None:
    """Train as the command line says, and write what came of it, an error of the user's included."""
    card, result, device, n_runs = arguments
    if folder := os.environ.get("TUNER_VERIFY_CODE"):
        sys.path.append(folder)
    found: dict[str, Any]
    try:
        found = {"runs": train_from_card(json.loads(Path(card).read_text(encoding="utf-8")), device, int(n_runs))}
    except TunerError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
