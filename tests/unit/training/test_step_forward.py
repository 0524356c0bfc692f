"""What a step's forward pass does with an epoch's last, smaller batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tuner.training.compiling import Compiler, Run
from tuner.training.dropout import start_dropout
from tuner.training.step_forward import StepForward, fill_rows

from .builders import CPU, SIZE, make_net


def make_plain_net() -> nn.Module:
    """Return a net whose rows have nothing to do with each other."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * 36, 2))


class NoisyNet(nn.Module):
    """Adds noise while it trains, as a drop-path would draw it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * SIZE * SIZE, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.fc(images.flatten(1))
        return logits + 1e-9 * torch.rand(1) if self.training else logits


class CenteringNet(nn.Module):
    """Takes the batch's mean away, with no BatchNorm that would say so."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * SIZE * SIZE, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.fc((images - images.mean(dim=0)).flatten(1))
        return logits


class CountingNet(nn.Module):
    """Counts in a buffer the images that it has trained on."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * SIZE * SIZE, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        if self.training:
            self.seen += len(images)
        logits: Tensor = self.fc(images.flatten(1))
        return logits


def make_forward(model: nn.Module, *, is_compiled: bool = True) -> tuple[StepForward, list[int]]:
    """Return a model's forward pass in train mode, and the sizes of what its stand-in for a compiled model is given."""
    sizes: list[int] = []

    def compile_model(model: Run) -> Run:
        def run(inputs: Tensor) -> Tensor:
            sizes.append(len(inputs))
            logits: Tensor = model(inputs)
            return logits

        return run

    compiler = Compiler(pytest.fail, compile_model) if is_compiled else None
    forward = StepForward(
        model.train(), model, "own", CPU, dropout=start_dropout(1, CPU), compiler=compiler, precision="auto"
    )
    return forward, sizes


def make_inputs(n_images: int) -> Tensor:
    """Return noise in the memory format of training."""
    return torch.rand(n_images, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)


def test_smaller_batch_is_filled_up_where_rows_are_alone() -> None:
    """The compiled model sees one shape, and the logits and gradients are those of the images alone."""
    model = make_plain_net()
    forward, sizes = make_forward(model)
    forward(make_inputs(8))
    few = make_inputs(3)
    logits = forward(few)
    assert set(sizes) == {8}
    torch.testing.assert_close(logits, model(few))
    weight = next(model.parameters())
    found, expected = (torch.autograd.grad(each.square().sum(), weight)[0] for each in (logits, model(few)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make_model", [make_net, NoisyNet, CenteringNet, CountingNet])
def test_smaller_batch_stays_as_it_is_where_filling_would_show(make_model: Callable[[], nn.Module]) -> None:
    """A BatchNorm that trains, a draw, a mean over the batch, a count: the plain model takes it, as if never tried."""
    model = make_model()
    forward, sizes = make_forward(model)
    few = make_inputs(3)
    forward(make_inputs(8))
    before = [buffer.clone() for buffer in model.buffers()]
    torch.manual_seed(1)
    expected = model(few)
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.data.copy_(value)
    torch.manual_seed(1)
    assert torch.equal(forward(few), expected)
    assert set(sizes) == {8}


def test_batch_norm_that_is_frozen_does_not_mix_rows() -> None:
    """In eval mode its statistics are fixed."""
    model = make_net()
    forward, sizes = make_forward(model)
    model.eval()
    forward(make_inputs(8))
    forward(make_inputs(3))
    assert sizes[-1] == 8


def test_plain_model_on_a_cpu_is_called_as_it_is() -> None:
    """No image is computed for nothing."""
    model = make_plain_net()
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    forward, _ = make_forward(model, is_compiled=False)
    forward(make_inputs(8))
    forward(make_inputs(3))
    assert seen == [8, 3]


@pytest.mark.parametrize(("n_rows", "n_wanted"), [(3, 8), (1, 4), (4, 8), (5, 6)])
def test_fill_rows_repeats_rows_in_their_memory_format(n_rows: int, n_wanted: int) -> None:
    """The batch itself comes first."""
    inputs = make_inputs(n_rows)
    filled = fill_rows(inputs, n_wanted)
    assert len(filled) == n_wanted
    assert torch.equal(filled, inputs[torch.arange(n_wanted) % n_rows])
    assert filled.is_contiguous(memory_format=torch.channels_last)
