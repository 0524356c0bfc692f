"""What a training step takes: the lines through two probes, the plan that follows, and the step itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.layers.evo_norm import EvoNorm2dB0
from torch import nn

from tuner.training.loop import TrainingJob, train_epochs
from tuner.training.memory import (
    MemoryLine,
    MemoryNeed,
    depends_on_batch,
    find_lines,
    measure_need,
    plan_micro_batch,
)
from tuner.training.memory_meter import TensorCount, list_tensors

from .builders import TinyNet, copy_state, make_images, make_job, make_net


def make_need(*lines: tuple[int, int], gradients: int = 0, scratch: int = 0) -> MemoryNeed:
    """Return a need of lines given as fixed bytes and bytes per image."""
    drawn = tuple(MemoryLine(fixed_bytes=fixed, bytes_per_image=each) for fixed, each in lines)
    return MemoryNeed(lines=drawn, gradient_bytes=gradients, scratch_bytes=scratch)


def test_need_predicts_the_highest_line_and_what_is_beside_tensors() -> None:
    """With few images the first line holds, with many the second; gradients count where they are added up."""
    need = make_need((100, 1), (10, 4), gradients=7, scratch=5)
    assert [need.predict(n) for n in (1, 30, 31, 100)] == [106, 135, 139, 415]
    assert need.predict(100, adds_up=True) == 422
    assert MemoryNeed.from_json(need.to_json()) == need


@pytest.mark.parametrize("values", [{}, {"lines": [], "gradient_bytes": 0, "scratch_bytes": 0}, {"lines": [{"a": 1}]}])
def test_need_refuses_other_json(values: dict[str, Any]) -> None:
    """A file of another version is no need."""
    with pytest.raises((KeyError, ValueError)):
        MemoryNeed.from_json(values)


def test_raised_need_predicts_what_was_seen_and_steeper_beyond() -> None:
    """A miss counts for larger batches too; what was predicted right stays."""
    need = make_need((100, 1), (10, 4))
    raised = need.raised(50, 300)
    assert 300 <= raised.predict(50) <= 300 + 50
    assert raised.predict(100) >= 550
    assert raised.predict(1) == 101
    assert need.raised(50, 200) is need
    assert need.raised(50, 300, adds_up=True).predict(50, adds_up=True) >= 300


@pytest.mark.parametrize(
    ("limit", "planned"), [(1000, 64), (740, 64), (739, 32), (420, 32), (419, 22), (120, 2), (110, 1), (109, None)]
)
def test_plan_micro_batch_takes_the_fewest_even_parts(limit: int, planned: int | None) -> None:
    """Whole if it fits; else parts as few and even as fit, down to one image."""
    assert plan_micro_batch(make_need((100, 10)), 64, limit, may_split=True) == planned


def test_plan_micro_batch_fits_what_it_plans_and_nothing_larger() -> None:
    """For every limit and batch size: the plan fits, and one part fewer would not."""
    need = make_need((200, 3), (50, 11), gradients=40, scratch=9)
    for batch_size in (1, 2, 7, 64, 100):
        for limit in range(100, 1300, 7):
            planned = plan_micro_batch(need, batch_size, limit, may_split=True)
            if planned is None:
                assert need.predict(1, adds_up=True) > limit
            elif planned < batch_size:
                assert need.predict(planned, adds_up=True) <= limit < need.predict(batch_size)
                n_fewer = -(-batch_size // planned) - 1
                assert n_fewer < 2 or need.predict(-(-batch_size // n_fewer), adds_up=True) > limit
            else:
                assert need.predict(batch_size) <= limit


def test_plan_micro_batch_splits_nothing_that_must_stay_whole() -> None:
    """Then a batch fits whole, or does not."""
    need = make_need((100, 10))
    assert plan_micro_batch(need, 64, 740, may_split=False) == 64
    assert plan_micro_batch(need, 64, 739, may_split=False) is None


def test_find_lines_keeps_those_that_are_highest_somewhere() -> None:
    """Of 0 + 5n, 40 + 1n, 20 + 2n and a constant 30, the third is never the highest: at 10 images it ties at best."""
    small, large = (10, 42, 24, 30), (20, 44, 28, 30)
    lines = find_lines((small, large), (2, 4))
    assert lines == (
        MemoryLine(fixed_bytes=40, bytes_per_image=1),
        MemoryLine(fixed_bytes=0, bytes_per_image=5),
    )


def test_find_lines_takes_the_peaks_of_steps_that_do_not_compare() -> None:
    """A model that works otherwise with other batches leaves two numbers; a falling line is flat."""
    assert find_lines(((3, 10, 4), (3, 20)), (2, 4)) == (MemoryLine(fixed_bytes=0, bytes_per_image=5),)
    assert find_lines(((9,), (7,)), (2, 4)) == (MemoryLine(fixed_bytes=9, bytes_per_image=0),)


class Wide(nn.Module):
    """Two layers of large and known sizes."""

    def __init__(self, width: int = 4096) -> None:
        super().__init__()
        self.flat = nn.Flatten()
        self.stem = nn.Linear(3 * 8 * 8, width)
        self.fc = nn.Linear(width, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        logits: torch.Tensor = self.fc(torch.relu(self.stem(self.flat(images))))
        return logits


def count_peak(job: TrainingJob) -> int:
    """Train a job; return the highest count of its tensors."""
    with TensorCount(job.device, list_tensors(job.model)) as count:
        for _ in train_epochs(job):
            pass
    peak: int = count.peak
    return peak


@pytest.mark.parametrize(("optimizer", "copies"), [("adamw", 4), ("sgd", 3)])
def test_measured_need_holds_weights_gradients_and_state(optimizer: str, copies: int) -> None:
    """Where weights decide: they, their gradients and the optimizer's one or two states, and hardly more."""
    job = make_job(Wide(), unfrozen_layers=2, optimizer=optimizer)
    weights = 4 * (192 * 4096 + 4096 + 2 * 4096 + 2)
    need = measure_need(job)
    assert need.predict(2) - need.scratch_bytes == pytest.approx(copies * weights, rel=0.08)
    assert need.gradient_bytes == weights


@pytest.mark.parametrize("unfrozen_layers", [1, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_measured_need_predicts_batches_that_were_not_probed(unfrozen_layers: int, optimizer: str) -> None:
    """Tensors are counted, so that the prediction is exact but for rounding, and the same again."""
    options: dict[str, Any] = {"unfrozen_layers": unfrozen_layers, "optimizer": optimizer, "epochs": 1}
    need = measure_need(make_job(**options))
    again = measure_need(make_job(**options))
    assert again.lines == need.lines
    for batch_size in (3, 16, 64):
        whole = replace(
            make_job(batch_size=batch_size, augmentation_strength=1.0, **options), train=make_images(2 * batch_size)
        )
        whole = replace(whole, val=make_images(16))
        assert need.predict(batch_size) - need.scratch_bytes == pytest.approx(count_peak(whole), rel=0.01)


def test_measured_need_bounds_added_gradients() -> None:
    """A batch in parts takes no more than is predicted for its parts, and much less than the whole batch."""
    job = make_job(batch_size=64, unfrozen_layers=3, epochs=1, augmentation_strength=1.0)
    need = measure_need(job)
    split = count_peak(replace(job, micro_batch=8, val=make_images(16)))
    assert split <= need.predict(8, adds_up=True) - need.scratch_bytes
    assert split < 0.5 * (need.predict(64) - need.scratch_bytes)


def test_measuring_leaves_the_job_as_it_was() -> None:
    """A trial that was measured before it trains gives the same bits."""
    options: dict[str, Any] = {"augmentation_strength": 0.5, "dropout": 0.3, "epochs": 2, "views": 2}
    plain, measured = make_job(**options), make_job(**options)
    before = copy_state(measured.model)
    measure_need(measured)
    assert all(torch.equal(value, before[name]) for name, value in measured.model.state_dict().items())
    losses = [[result.val_loss for result, _ in train_epochs(job)] for job in (plain, measured)]
    assert losses[0] == losses[1]


def test_depends_on_batch_sees_batchnorm_that_trains() -> None:
    """In layers that train, not below the cut; other norms and other people's statistics are told apart."""
    assert depends_on_batch(make_net(), 3)
    assert depends_on_batch(make_net(), 2)
    assert not depends_on_batch(make_net(), 1)
    assert not depends_on_batch(Wide(), 2)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (nn.BatchNorm2d(4, track_running_stats=False), True),
        (EvoNorm2dB0(4), True),
        (nn.GroupNorm(2, 4), False),
    ],
)
def test_depends_on_batch_knows_norms(norm: nn.Module, expected: bool) -> None:
    """By torch's class, or by running statistics that a layer keeps."""
    net = TinyNet()
    net.stem[1], net.middle[1] = norm, nn.Identity()
    assert depends_on_batch(net, 3) is expected
