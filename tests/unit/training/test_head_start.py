"""The head that is trained first: nothing else moves, and features give the same one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tuner.training import step_graphs
from tuner.training.cohort import CohortJob, train_cohort
from tuner.training.epoch_numbers import Diverged
from tuner.training.head_features import compute_features, put_head
from tuner.training.head_start import train_head
from tuner.training.loop import TrainingJob, train_epochs
from tuner.training.prepare import start_heads
from tuner.training.step_graphs import Step, StepGraphs
from tuner.trial import HeadStart

from .builders import CPU, PREPROCESSING, TinyNet, copy_state, make_job, make_net, make_params

HEAD: dict[str, Any] = {"lr": 0.05, "dropout": 0.2, "label_smoothing": 0.1, "seed": 21, "epochs": 3}


def make_started(net: TinyNet | None = None, head: dict[str, Any] = HEAD, **overrides: Any) -> TrainingJob:
    """Return a job whose recipe starts from a trained head."""
    job = make_job(net or make_net(), **overrides)
    start = HeadStart.take_from(make_params(unfrozen_layers=1, **head))
    return replace(job, params=replace(job.params, head_start=start))


def fc_of(job: TrainingJob) -> nn.Linear:
    """Return the head of a job's model."""
    head = job.model.get_submodule("fc")
    assert isinstance(head, nn.Linear)
    return head


def test_train_head_moves_the_head_alone() -> None:
    """All below it, BatchNorm statistics included, keeps every bit; the head is told of epoch by epoch."""
    job = make_started()
    before, told = copy_state(job.model), []
    train_head(job, on_epoch=lambda epoch, loss: told.append((epoch, loss)))
    after = copy_state(job.model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}
    assert [epoch for epoch, _ in told] == [1, 2, 3]
    assert told[-1][1] < told[0][1]


def test_train_head_leaves_a_recipe_without_one_alone() -> None:
    """Every bit of the model, and torch's random numbers."""
    job = make_job()
    before = copy_state(job.model)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    train_head(job)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in copy_state(job.model).items())


def test_steps_of_a_head_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are on images, whose memory nobody has foreseen twice."""
    monkeypatch.setattr(step_graphs, "_LEAST_STEPS", 0)

    def refuse(*_: object) -> Step:
        pytest.fail("recorded")

    train_head(replace(make_started(head=HEAD | {"dropout": 0.0}), graphs=StepGraphs(pytest.fail, refuse)))


def test_trained_head_is_better_than_a_new_one_after_the_first_epoch() -> None:
    """The first epoch of the whole net goes on from what the head has learnt."""
    curves = []
    for job in (make_job(lr=1e-4, epochs=1), make_started(lr=1e-4, epochs=1)):
        train_head(job)
        curves.append([result.val_accuracy for result, _ in train_epochs(job)])
    (without,), (started,) = curves
    assert started > without + 0.1


def test_training_after_a_head_start_is_the_ordinary_one() -> None:
    """Bit for bit that of a model which was made with this head: its own seeds decide, whatever the head has drawn."""
    options: dict[str, Any] = {"augmentation_strength": 0.5, "dropout": 0.3, "epochs": 2}
    job = make_started(**options)
    train_head(job)
    plain = make_job(make_net(), **options)
    put_head(plain.model, fc_of(job).weight.detach(), fc_of(job).bias.detach())
    losses = [[result.val_loss for result, _ in train_epochs(each)] for each in (job, plain)]
    assert losses[0] == losses[1]
    assert all(torch.equal(tensor, copy_state(plain.model)[name]) for name, tensor in copy_state(job.model).items())


@pytest.mark.parametrize("keep_head", [False, True])
def test_head_on_features_is_the_head_on_images(*, keep_head: bool) -> None:
    """In double precision to 1e-9; from the head that the seed draws, or from the one that the model holds."""
    job = make_started(make_net().double())
    assert isinstance(job.model, TinyNet)
    recipe = job.params.head_recipe
    assert recipe is not None
    assert job.val is not None
    features, val_features = (
        compute_features(job.model, images, PREPROCESSING, CPU, precision="auto") for images in (job.train, job.val)
    )
    weights, biases = start_heads(fc_of(job), [recipe.seed], keep_head=keep_head)
    cohort = CohortJob(
        params=(recipe,),
        features=lambda _: features,
        labels=job.train.labels,
        val_features=val_features,
        val_labels=job.val.labels,
        n_classes=2,
        weights=weights,
        biases=biases,
        device=CPU,
    )
    for epoch in train_cohort(cohort):
        weight, bias = epoch.heads[0]
    train_head(job, keep_head=keep_head)
    torch.testing.assert_close(fc_of(job).weight.detach(), weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fc_of(job).bias.detach(), bias, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(weight, weights[0], rtol=0.01)


def test_train_head_tells_a_head_that_diverges() -> None:
    """As any training does."""
    with pytest.raises(Diverged, match=r"^training loss is (nan|inf) in epoch"):
        train_head(make_started(head=HEAD | {"lr": 1e30, "optimizer": "sgd", "warmup_fraction": 0.0}))
