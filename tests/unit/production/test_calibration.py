"""Calibration against models whose honesty is known."""

import math

import pytest
import torch

from tuner.production.calibration import N_BINS, fit_temperature, measure_calibration, softmax


def make_predictions(*, overconfidence: float, n_images: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and labels of a model whose probabilities are right once its logits are divided."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n_images, 4, generator=generator, dtype=torch.float64) * 1.5
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)
    return logits * overconfidence, labels


@pytest.mark.parametrize("overconfidence", [0.5, 1.0, 3.0])
def test_temperature_undoes_over_and_underconfidence(overconfidence: float) -> None:
    """What multiplied the logits is what divides them, and the error goes with it."""
    logits, labels = make_predictions(overconfidence=overconfidence)
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(overconfidence, rel=0.05)
    before, after = (measure_calibration(logits, labels, temperature=each) for each in (1.0, temperature))
    assert after.ece < 0.02
    assert after.log_loss <= before.log_loss
    if overconfidence != 1.0:
        assert before.ece > 0.1


def test_perfect_score_is_no_certainty() -> None:
    """Of images that are all right the mean confidence stays near (n + 1) / (n + 2), whatever the model says."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (180,), generator=generator)
    logits = torch.randn(180, 5, generator=generator) + 8 * torch.nn.functional.one_hot(labels, 5)
    assert (logits.argmax(dim=1) == labels).all()
    for scale in (0.3, 1.0, 10.0):
        confidence = softmax(logits * scale, fit_temperature(logits * scale, labels)).max(dim=1).values.mean()
        assert confidence == pytest.approx(181 / 182, abs=0.002)


def test_calibration_error_is_what_it_says() -> None:
    """Two bins by hand: three of four right at 0.9, one of two right at 0.6."""
    probabilities = torch.tensor([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 2, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 0, 1])
    found = measure_calibration(probabilities.log(), labels)
    assert [(part.n_images, round(part.confidence, 6), part.accuracy) for part in found.bins] == [
        (2, 0.6, 0.5),
        (4, 0.9, 0.75),
    ]
    assert found.ece == pytest.approx((2 * 0.1 + 4 * 0.15) / 6)
    assert found.log_loss == pytest.approx(-(3 * math.log(0.9) + math.log(0.1) + math.log(0.6) + math.log(0.4)) / 6)


def test_certainty_falls_into_the_last_bin_and_infinity_is_no_json() -> None:
    """A probability of exactly 1 has a bin; a certain mistake has an infinite loss, which JSON does not know."""
    logits = torch.tensor([[1000.0, 0.0], [0.0, float("inf")]], dtype=torch.float64)
    found = measure_calibration(logits[:1], torch.tensor([0]))
    assert len(found.bins) == 1
    assert found.bins[0].confidence == 1.0
    assert 1.0 / N_BINS < 1.0
    wrong = measure_calibration(torch.tensor([[float("-inf"), 0.0]]), torch.tensor([0]))
    assert wrong.to_json()["log_loss"] is None


def test_temperature_changes_no_prediction() -> None:
    """Only how sure it is."""
    logits, _ = make_predictions(overconfidence=2.0, n_images=100)
    cold, hot = softmax(logits, 0.5), softmax(logits, 5.0)
    assert torch.equal(cold.argmax(dim=1), hot.argmax(dim=1))
    assert (cold.max(dim=1).values > hot.max(dim=1).values).all()
