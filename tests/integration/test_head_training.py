"""A worker's heads: the same recipes on features and on images, and what happens when something is wrong."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.service.test_wire import PARAMS
from tuner.service.messages import EpochDone, GivenBack, Reply, Train, TrialDone, Verdict
from tuner.service.study_data import read_study_data
from tuner.service.training_session import TrainingSession
from tuner.service.workbench import Workbench
from tuner.spec.study import parse_spec
from tuner.training.package import read_package
from tuner.trial import EpochResult, TrialParams

OWN = "tests.integration.own_backbones"
HEAD = replace(
    PARAMS,
    backbone=f"{OWN}:plain",
    lr=0.05,
    unfrozen_layers=1,
    augmentation_strength=0.0,
    horizontal_flip=False,
    epochs=2,
)


@dataclass(kw_only=True)
class Desk:
    """Stands in for the coordinator: keeps what it is told, and answers as a test wants."""

    answer: Callable[[EpochDone], Verdict] = lambda _: Verdict()
    replies: list[Reply] = field(default_factory=list)
    epochs: list[EpochDone] = field(default_factory=list)

    def send(self, reply: Reply) -> None:
        """Keep a reply."""
        self.replies.append(reply)

    def ask_verdict(self, done: EpochDone) -> Verdict:
        """Keep an epoch, and answer."""
        self.epochs.append(done)
        return self.answer(done)

    def curve(self, number: int) -> list[EpochResult]:
        """Return what a trial's epochs showed."""
        return [result for done in self.epochs for each, result in done.results if each == number]

    def ends(self) -> dict[int, TrialDone]:
        """Return how trials ended."""
        return {reply.number: reply for reply in self.replies if isinstance(reply, TrialDone)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))


def make_session(folder: Path, desk: Desk, backbone: str = HEAD.backbone) -> TrainingSession:
    """Return a worker's session on three digits."""
    tables: dict[str, Any] = {
        "study": {"name": "heads", "seed": 5},
        "data": {"source": "digits", "classes": ["7", "8", "9"], "image_size": 16},
        "space": {"lr": {"low": 1e-4, "high": 1e-1, "log": True}},
        "training": {"backbone": backbone, "unfrozen_layers": 1, "epochs": 2, "horizontal_flip": False},
    }
    spec = parse_spec(tables, folder)
    notes: list[str] = []
    bench = Workbench(spec, read_study_data(spec), device="cpu", n_threads=1, note=notes.append)
    return TrainingSession(bench, desk)


def train(folder: Path, *recipes: TrialParams, uses_features: bool = True, desk: Desk | None = None) -> Desk:
    """Train recipes under the numbers 0, 1, …, as one request; return what the coordinator heard."""
    desk = desk or Desk()
    session = make_session(folder, desk, recipes[0].backbone)
    session.train(Train(data_hash="", members=tuple(enumerate(recipes)), uses_features=uses_features))
    return desk


RECIPES = (
    HEAD,
    replace(HEAD, lr=0.2, seed=7, label_smoothing=0.0, dropout=0.0),
    replace(HEAD, lr=0.01, seed=8, dropout=0.6, warmup_fraction=0.5, momentum=0.0),
)


@pytest.mark.parametrize(("strength", "views"), [(0.0, "fresh"), (0.5, 2)])
def test_heads_on_features_are_the_heads_on_images(tmp_path: Path, strength: float, views: Any) -> None:
    """The same recipe gives the same curve and the same kept model, whichever way it is trained."""
    recipes = [replace(each, augmentation_strength=strength, views=views, view_seed=5) for each in RECIPES]
    curves, models = [], []
    for uses_features in (True, False):
        folder = tmp_path / f"model-{uses_features}"
        keep = Verdict(keep=1, folder=str(folder))
        desk = Desk(answer=lambda done, keep=keep: keep if done.results[0][1].epoch == 2 else Verdict())  # type: ignore[misc]
        train(tmp_path, *recipes, uses_features=uses_features, desk=desk)
        assert {number: end.kept for number, end in desk.ends().items()} == {0: False, 1: True, 2: False}
        curves.append([[(each.train_loss, each.val_loss) for each in desk.curve(number)] for number in range(3)])
        models.append(read_package(folder, allow_code=True)[0].state_dict())
    for ours, theirs in zip(*curves, strict=True):
        assert ours == [pytest.approx(each, rel=1e-4) for each in theirs]
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=1e-3, atol=1e-5)


def test_pruned_and_diverged_heads_end_by_themselves(tmp_path: Path) -> None:
    """The others go on to the last epoch as if they had been alone."""
    sgd = [replace(each, optimizer="sgd") for each in (*RECIPES, replace(HEAD, lr=1e38))]
    desk = train(tmp_path, *sgd, desk=Desk(answer=lambda _: Verdict(stop=(1,))))
    ends = {number: (end.outcome.state.value, end.outcome.reason) for number, end in desk.ends().items()}
    assert ends == {0: ("COMPLETE", None), 1: ("PRUNED", "pruner"), 2: ("COMPLETE", None), 3: ("PRUNED", "diverged")}
    alone = train(tmp_path, sgd[2])
    assert [each.val_loss for each in desk.curve(2)] == pytest.approx([each.val_loss for each in alone.curve(0)])
    assert len(desk.curve(1)) == 1


def test_features_are_computed_once_and_their_use_is_told(tmp_path: Path) -> None:
    """The first cohort pays, the later ones do not; each saves what its epochs would have taken."""
    desk = Desk()
    session = make_session(tmp_path, desk)
    for first in (0, 3):
        members = tuple(enumerate(RECIPES, start=first))
        session.train(Train(data_hash="", members=members, uses_features=True))
    usages = [end.usage for _, end in sorted(desk.ends().items())]
    assert [usage.features for usage in usages] == ["computed"] * 3 + ["cached"] * 3
    assert {usage.cohort_size for usage in usages} == {3}
    assert usages[3].saved_seconds > usages[0].saved_seconds > 0
    assert train(tmp_path, HEAD).ends()[0].usage.features == "cached"  # another worker


def test_heads_of_a_body_with_its_own_dropout_are_given_back(tmp_path: Path) -> None:
    """Features would leave out what trains with the head."""
    desk = train(tmp_path, replace(HEAD, backbone=f"{OWN}:dropping"), HEAD)
    (reply,) = desk.replies
    assert isinstance(reply, GivenBack)
    assert (reply.numbers, reply.is_lasting) == ((0, 1), True)


def test_heads_are_given_back_when_their_features_cannot_be_computed(tmp_path: Path) -> None:
    """Each is then judged by itself, where the error is its own."""
    recipe = replace(HEAD, backbone=f"{OWN}:raising")
    (reply,) = train(tmp_path, recipe, recipe).replies
    assert reply == GivenBack(numbers=(0, 1), backbone=recipe.backbone, reason="the user's own bug", is_lasting=False)
    end = train(tmp_path, recipe, uses_features=False).ends()[0]
    assert end.outcome.message == "ValueError: the user's own bug"


def test_error_after_an_epoch_ends_the_cohorts_trials(tmp_path: Path) -> None:
    """They cannot be given back, since the study holds what they reported: each is to be tried again alone."""

    def fail(_: EpochDone) -> Verdict:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ends = train(tmp_path, *RECIPES, desk=Desk(answer=fail)).ends()
    assert {end.outcome.reason for end in ends.values()} == {"cohort_lost"}
    assert sorted(ends) == [0, 1, 2]
    alone = train(tmp_path, RECIPES[0], desk=Desk(answer=fail)).ends()
    assert alone[0].outcome.reason == "out_of_memory"  # nobody else can be to blame


def test_model_that_cannot_be_kept_costs_the_folder_and_not_the_trials(tmp_path: Path) -> None:
    """They went through all their epochs."""
    desk = Desk()
    session = make_session(tmp_path, desk)

    def lose_weights(done: EpochDone) -> Verdict:
        if done.results[0][1].epoch == 2:
            session._bench.spec = None  # type: ignore[assignment]
        return Verdict(keep=1, folder=str(tmp_path / "model"))

    desk.answer = lose_weights
    session.train(Train(data_hash="", members=tuple(enumerate(RECIPES)), uses_features=True))
    assert {(end.outcome.state.value, end.kept) for end in desk.ends().values()} == {("COMPLETE", False)}
