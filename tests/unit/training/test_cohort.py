"""What a cohort asks for and gives; that it trains rightly is shown in test_equivalence."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tuner.training.cohort import CohortJob, differentiate_loss, train_cohort
from tuner.training.epoch_numbers import Diverged

from .builders import CPU, make_params


def make_cohort(*own: dict[str, Any], **shared: Any) -> CohortJob:
    """Return a cohort on features of two classes that a line tells apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(50) % 2
    features = torch.randn(50, 6, generator=generator) + labels[:, None]
    values = {"unfrozen_layers": 1, "batch_size": 8, "epochs": 3} | shared
    params = tuple(make_params(**{**values, "seed": seed, **one}) for seed, one in enumerate(own or ({}, {})))
    return CohortJob(
        params=params,
        features=lambda _: features[:40],
        labels=labels[:40],
        val_features=features[40:],
        val_labels=labels[40:],
        n_classes=2,
        weights=torch.randn(len(params), 2, 6, generator=generator),
        biases=torch.zeros(len(params), 2),
        device=CPU,
    )


def test_train_cohort_reports_every_epoch_of_every_trial() -> None:
    """Numbered from 1, with the heads that the numbers belong to; each trial bears its share of the time."""
    job = make_cohort({"lr": 0.1}, {"lr": 0.2})
    for number, shown in enumerate(train_cohort(job), start=1):
        assert shown.epoch == number
        assert set(shown.results) == set(shown.heads) == {0, 1}
        for index, (weight, bias) in shown.heads.items():
            result, scores = shown.results[index]  # type: ignore[misc]
            logits = job.val_features @ weight.T + bias
            assert result.epoch == number
            assert result.val_loss == pytest.approx(functional.cross_entropy(logits, job.val_labels).item(), rel=1e-5)
            assert np.array_equal(scores.predictions, logits.argmax(dim=1))
            assert np.array_equal(scores.labels, job.val_labels)
            assert result.seconds > 0
            assert result.images_per_second > 40
    assert number == 3


def test_train_cohort_asks_for_the_features_of_each_epoch() -> None:
    """Once, in turn: an epoch may show another view."""
    asked: list[int] = []
    job = make_cohort()

    def fetch(epoch: int) -> Tensor:
        asked.append(epoch)
        return job.features(epoch)

    for _ in train_cohort(replace(job, features=fetch)):
        pass
    assert asked == [1, 2, 3]


def test_train_cohort_ends_when_all_are_stopped() -> None:
    """Nothing is trained for nobody."""
    epochs = train_cohort(make_cohort())
    next(epochs)
    assert set(epochs.send(frozenset({1})).results) == {0}
    with pytest.raises(StopIteration):
        epochs.send(frozenset({0}))


def test_train_cohort_leaves_the_first_heads_alone() -> None:
    """The caller's tensors are its own."""
    job = make_cohort()
    before = job.weights.clone()
    list(train_cohort(job))
    assert torch.equal(job.weights, before)


def test_train_cohort_tells_a_diverged_training_loss_once() -> None:
    """In the loop's words, without a head; the other goes on."""
    job = make_cohort({}, {"lr": 1e30}, optimizer="sgd", warmup_fraction=0.0)
    shown = list(train_cohort(job))
    endings = [result for one in shown for result in one.results.values() if isinstance(result, Diverged)]
    assert [str(ending) for ending in endings] == ["training loss is nan in epoch 1, step 3 of 5"]
    assert [set(one.heads) for one in shown] == [{0}, {0}, {0}]
    assert [set(one.results) for one in shown] == [{0, 1}, {0}, {0}]


def test_train_cohort_tells_a_diverged_validation_loss() -> None:
    """Finite in training is not enough."""
    job = make_cohort()
    shown = list(train_cohort(replace(job, val_features=job.val_features * math.nan)))
    assert [str(one) for one in shown[0].results.values()] == ["validation loss is nan in epoch 1"] * 2
    assert len(shown) == 1


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (({}, {"backbone": "other"}), r"must share backbone, got \['other', 'tiny'\]"),
        (({}, {"batch_size": 4}), r"must share batch_size, got \[4, 8\]"),
        (({}, {"optimizer": "sgd"}), "must share optimizer"),
        (({}, {"epochs": 5}), "must share epochs"),
        (({}, {"class_weights": "balanced"}), "must share class_weights"),
        (({}, {"augmentation_strength": 0.5, "views": 2}), "must share augmentation_strength"),
        (({}, {"views": 2}), r"must share views, got \[2, 'fresh'\]"),
        (({"view_seed": 1}, {"view_seed": 2}), "must share view_seed"),
        (({"unfrozen_layers": 2},), "must train the head alone, on images known beforehand, got unfrozen_layers = 2"),
    ],
)
def test_train_cohort_refuses_what_one_computation_cannot_vary(own: tuple[dict[str, Any], ...], message: str) -> None:
    """At the call, with the name of what differs."""
    shared = {"augmentation_strength": 0.5, "views": 2} if "view_seed" in own[0] else {}
    with pytest.raises(ValueError, match=rf"^params: {message}"):
        train_cohort(make_cohort(*own, **shared))


def test_train_cohort_refuses_fresh_images() -> None:
    """Their features are not known."""
    with pytest.raises(
        ValueError, match=r"images known beforehand, got unfrozen_layers = 1, strength 0\.5, views fresh"
    ):
        train_cohort(make_cohort(augmentation_strength=0.5))


def test_train_cohort_refuses_heads_that_do_not_fit() -> None:
    """As many as trials, of as many classes as there are."""
    job = make_cohort()
    with pytest.raises(ValueError, match=r"^weights: must be \(2, 2, n_features\) .*got \(1, 2, 6\)$"):
        train_cohort(replace(job, weights=job.weights[:1]))
    with pytest.raises(ValueError, match=r"^biases: must be \(2, 2\), got \(2, 3\)$"):
        train_cohort(replace(job, biases=torch.zeros(2, 3)))


@pytest.mark.parametrize("balanced", [True, False])
def test_differentiate_loss_is_torchs_cross_entropy(balanced: bool) -> None:
    """Each trial's loss and gradient as autograd has them for its batch alone, labels smoothed by its own amount."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (3, 5), generator=generator)
    class_weights = torch.tensor([0.5, 2.0, 1.0, 4.0] if balanced else [1.0] * 4, dtype=torch.float64)
    smoothing = torch.tensor([0.0, 0.1, 0.7], dtype=torch.float64)
    expected = torch.stack(
        [
            functional.cross_entropy(logits[i], labels[i], weight=class_weights, label_smoothing=smoothing[i].item())
            for i in range(3)
        ]
    )
    expected.sum().backward()  # type: ignore[no-untyped-call]
    losses, slopes = differentiate_loss(logits.detach(), labels, smoothing, class_weights)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(slopes, logits.grad)


def test_differentiate_loss_of_a_class_without_a_share_is_torchs() -> None:
    """A logit of minus infinity costs nothing unless labels are smoothed, as the loop has it."""
    logits = torch.tensor([[[1.0, -math.inf]]]).expand(2, 1, 2)
    labels, smoothing = torch.zeros(2, 1, dtype=torch.int64), torch.tensor([0.0, 0.1])
    losses, _ = differentiate_loss(logits, labels, smoothing, torch.ones(2))
    assert losses.tolist() == [0.0, math.inf]
    assert [functional.cross_entropy(logits[0], labels[0], label_smoothing=s).item() for s in (0.0, 0.1)] == [
        0,
        math.inf,
    ]
