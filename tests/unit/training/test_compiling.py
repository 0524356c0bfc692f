"""Compiled models are compared before they train, and never reach a file."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.training.checkpoint import CheckpointFile
from tuner.training.compiling import Compiler, Run
from tuner.training.dropout import start_dropout
from tuner.training.loop import TrainingJob, train_epochs
from tuner.trial import Precision

from .builders import CPU, SIZE, copy_state, make_job, make_net

# torch's tracer looks at .grad of what lies between two traces, which torch itself warns of
# (https://github.com/pytorch/pytorch/pull/30531).
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def compile_for_autograd(model: Run) -> Run:
    """Trace a model as torch.compile does, and run the traces without generating code, which takes long."""
    from torch._dynamo import config

    config.skip_nnmodule_hook_guards = False
    compiled: Run = torch.compile(model, backend="aot_eager", dynamic=False)
    return compiled


def check_compiled(compiler: Compiler, model: nn.Module, name: str = "own") -> bool:
    """Return whether a compiler compiles a model for a batch of noise."""
    inputs = torch.rand(8, 3, SIZE, SIZE)
    return (
        compiler.compile_checked(model.train(), model, inputs, name, start_dropout(1, CPU), precision="auto")
        is not None
    )


def train(job: TrainingJob) -> list[tuple[float, float]]:
    """Train to the end, and return the losses of every epoch."""
    return [(result.train_loss, result.val_loss) for result, _ in train_epochs(job)]


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}, {"unfrozen_layers": 1}, {"batch_size": 24}], ids=str)
def test_compiled_training_is_the_plain_one(options: dict[str, Any]) -> None:
    """The same losses and weights, with dropout in front of the head, frozen layers and a smaller last batch."""
    notes: list[str] = []
    plain = make_job(epochs=2, **options)
    compiled = replace(make_job(epochs=2, **options), compiler=Compiler(notes.append, compile_for_autograd))
    assert train(compiled) == [pytest.approx(losses, rel=1e-4) for losses in train(plain)]
    assert notes == []
    expected = copy_state(plain.model)
    assert list(copy_state(compiled.model)) == list(expected)
    for name, tensor in copy_state(compiled.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


def test_checkpoint_of_a_compiled_training_is_one_of_the_plain_model(tmp_path: Path) -> None:
    """A plain training goes on from it; no name in it speaks of compiling."""
    file = CheckpointFile(tmp_path / "file", number=1, identity={}, every_seconds=0.0, note=pytest.fail)
    job = replace(make_job(epochs=2), compiler=Compiler(pytest.fail, compile_for_autograd))
    losses = [result.train_loss for result, _ in train_epochs(job, file)]
    again = make_job(epochs=2)
    saved = file.read(again.model)
    assert saved is not None
    assert not [name for name in saved.state["parameters"] if "orig_mod" in name]
    rest = [result.train_loss for result, _ in train_epochs(again, None, saved)]
    assert rest == pytest.approx(losses[1:], rel=1e-4)


def test_compiler_leaves_model_and_draws_as_they_were() -> None:
    """Comparing spends nothing that the training will need: statistics, seeds, gradients."""
    model, dropout = make_net().train(), start_dropout(1, CPU)
    before, state = copy_state(model), dropout.get_state()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    Compiler(pytest.fail, lambda model: model).compile_checked(
        model, model, torch.rand(8, 3, SIZE, SIZE), "own", dropout, precision="auto"
    )
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(dropout.get_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def make_other_logits(model: Run) -> Run:
    """Return a model with a mistake."""
    return lambda inputs: model(inputs) * 1.01


def make_other_gradients(model: Run) -> Run:
    """Return a model with a mistake that shows in training alone."""

    def run(inputs: Tensor) -> Tensor:
        logits: Tensor = model(inputs)
        return logits.detach() + 0.5 * (logits - logits.detach())

    return run


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiler_allows_the_rounding_of_the_precision_alone(precision: Precision) -> None:
    """A hundredth is within bfloat16's rounding, and not within float32's."""
    model, inputs = make_net().train(), torch.rand(8, 3, SIZE, SIZE)
    compiler = Compiler(lambda _: None, make_other_logits)
    found = compiler.compile_checked(model, model, inputs, "own", start_dropout(1, CPU), precision=precision)
    assert (found is not None) is (precision == "bfloat16")


def fail_to_compile(_: Run) -> Run:
    """Raise as torch does where there is no compiler."""
    raise RuntimeError("Failed to find C++ compiler\nset CXX")


@pytest.mark.parametrize(
    ("compile_model", "reason"),
    [
        (make_other_logits, "the compiled model gives other logits"),
        (make_other_gradients, "the compiled model gives other gradients"),
        (fail_to_compile, "Failed to find C++ compiler"),
    ],
)
def test_compiler_gives_a_backbone_up_with_one_note(compile_model: Any, reason: str) -> None:
    """Its trials train uncompiled, and are not tried again; other backbones are."""
    notes: list[str] = []
    tried: list[Run] = []

    def try_compiling(model: Run) -> Run:
        tried.append(model)
        return compile_model(model)  # type: ignore[no-any-return]

    compiler = Compiler(notes.append, try_compiling)
    assert not check_compiled(compiler, make_net())
    assert not check_compiled(compiler, make_net())
    assert notes == [f"own trains uncompiled: {reason}"]
    assert len(tried) == 1
    assert not check_compiled(compiler, make_net(), "other")
    assert len(tried) == 2


def test_training_goes_on_without_a_compiler() -> None:
    """To the same bits as if nothing had been tried."""
    notes: list[str] = []
    job = replace(make_job(epochs=2, dropout=0.3), compiler=Compiler(notes.append, fail_to_compile))
    assert train(job) == train(make_job(epochs=2, dropout=0.3))
    assert len(notes) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_torch_compiles_a_model_for_the_cpu() -> None:
    """The real compiler, with generated code: the same losses but for rounding."""
    notes: list[str] = []
    # Not adamw, which makes steps of the rounding in a gradient that is 0, that of a bias before a BatchNorm.
    options: dict[str, Any] = {"epochs": 2, "dropout": 0.3, "optimizer": "sgd"}
    job = replace(make_job(**options), compiler=Compiler(notes.append))
    assert train(job) == [pytest.approx(losses, rel=1e-4) for losses in train(make_job(**options))]
    assert notes == []
    assert not [name for name in job.model.state_dict() if "orig_mod" in name]
