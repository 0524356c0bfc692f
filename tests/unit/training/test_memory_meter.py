"""Tensors counted while they live, and what the system says of the process."""

import resource
import subprocess
import sys

import pytest
import torch

from tuner.training.device import is_out_of_memory
from tuner.training.memory_meter import Growth, TensorCount, below, count_bytes, find_ceiling, list_tensors

from .builders import CPU, make_net

MEBIBYTE = 1 << 20


def test_tensor_count_follows_tensors_as_they_live_and_die() -> None:
    """Views share their storage; what nobody refers to is gone; what was held before counts."""
    held = torch.zeros(100)
    with TensorCount(CPU, [held]) as count:
        first = torch.ones(1000)
        view = first[10:].reshape(-1)
        del first
        second = view + 1
        del view
        third = second * 2
        second.add_(third)
    assert count.trace[0] == 400 + 4000
    assert count.peak == 400 + 4000 + 3960
    assert count.trace[-1] == 400 + 3960 + 3960


def test_tensor_count_sees_what_autograd_keeps() -> None:
    """An input that only the backward pass needs stays until it is through."""
    weight = torch.ones(1000, requires_grad=True)
    with TensorCount(CPU) as count:
        loss = (weight * 2).square().sum()
        kept = count.trace[-1]
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        torch.ones(1)
    assert kept >= 4000
    assert count.trace[-1] == 4000 + 4  # the gradient


def test_count_bytes_counts_each_storage_once() -> None:
    """Weights that two layers share lie in memory once."""
    net = make_net()
    alone = count_bytes(net)
    assert alone == sum(each.nbytes for each in list_tensors(net))
    net.tied = net.fc
    assert count_bytes(net) == alone


def test_growth_sees_what_a_process_takes_at_its_highest() -> None:
    """Also what was given back before anyone looked."""
    growth = Growth(CPU)
    block = torch.ones(64 * MEBIBYTE // 4)
    del block
    grown = growth.read()
    assert grown is None or grown >= 60 * MEBIBYTE


def test_below_makes_torch_run_out_of_memory_and_ends_with_the_block() -> None:
    """What fits is allowed, more is refused in torch's words, and afterwards there is no limit."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with below(find_ceiling(128 * MEBIBYTE)):
        torch.ones(64 * MEBIBYTE // 4)
        with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
            torch.ones(256 * MEBIBYTE // 4)
    assert is_out_of_memory(caught.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with below(None):
        torch.ones(256 * MEBIBYTE // 4)


_WATCH = """
import sys, torch
from dataclasses import replace
from tests.unit.training.builders import make_images, make_job
from tuner.training.loop import train_epochs
from tuner.training.memory import measure_need
from tuner.training.memory_meter import Growth, count_bytes, keep_heap_tight
import timm
torch.set_num_threads(1)
keep_heap_tight()
job = make_job(timm.create_model("resnet18", num_classes=2), unfrozen_layers=6, epochs=1, batch_size=256)
need = measure_need(job)
job = replace(job, train=make_images(512))
growth = Growth(job.device)
list(train_epochs(job))
print(growth.read() + count_bytes(job.model), need.predict(256))
"""


@pytest.mark.slow
def test_predicted_peak_is_what_the_process_takes() -> None:
    """Kernels' own memory included, in a process of its own: within 15 % of its highest resident size."""
    done = subprocess.run([sys.executable, "-c", _WATCH], capture_output=True, text=True, timeout=120, check=True)
    actual, predicted = map(int, done.stdout.split())
    assert predicted == pytest.approx(actual, rel=0.15)
