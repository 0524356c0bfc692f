"""Wrong backbones, weights, numbers and devices: each mistake with its exact message and exit code."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.e2e.mistakes import Edit, Mistake, expect, fail, use_backbone, write, write_study


class _RunsCode:
    """Pickled, it makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("pwned",)


SMALL_DISK = """
import shutil
from types import SimpleNamespace
shutil.disk_usage = lambda _: SimpleNamespace(free=10**8)
"""
"""Imported by every process as it starts."""
HUB = "https://huggingface.co/timm/resnet18.a1_in1k/resolve/main/model.safetensors"
MISTAKES = [
    Mistake(
        what="unknown backbone",
        edits=use_backbone("resnet5O"),
        problem="space.backbone: must be a timm model, 'tuner:small_cnn' or 'package.module:function', got 'resnet5O'; "
        "did you mean 'resnet50'?",
    ),
    Mistake(
        what="unknown tag",
        edits=use_backbone("resnet50.a1_in2k"),
        problem="space.backbone: must be resnet50 with one of timm's pretrained tags, got 'resnet50.a1_in2k'; "
        "did you mean 'resnet50.a1_in1k'?",
    ),
    Mistake(
        what="own module missing",
        edits=use_backbone("own_nets:make"),
        problem="space.backbone: must name a module that can be imported, got 'own_nets:make' "
        "(ModuleNotFoundError: No module named 'own_nets')",
    ),
    Mistake(
        what="own function raises",
        edits=use_backbone("own_nets:make"),
        prepare=write("own_nets.py", "def make(num_classes): raise KeyError('depth')"),
        problem="space.backbone: 'own_nets:make' must return a model, got KeyError: 'depth'",
    ),
    Mistake(
        what="own function returns no module",
        edits=use_backbone("own_nets:make"),
        prepare=write("own_nets.py", "def make(num_classes): return num_classes"),
        problem="space.backbone: 'own_nets:make' must return a torch.nn.Module, got int",
    ),
    Mistake(
        what="weights missing",
        edits=(("random", "w.safetensors"),),
        problem="backbones.\"test_resnet\".weights: must be a file that exists, got 'FOLDER/w.safetensors'",
    ),
    Mistake(
        what="weights of another net",
        edits=(("random", "w.safetensors"),),
        prepare=lambda folder: save_file({"cls_token": np.zeros(3, np.float32)}, folder / "w.safetensors"),
        problem='backbones."test_resnet".weights: must hold the backbone\'s 90 tensors in their shapes, '
        "got none of them but cls_token; is it another backbone's file?",
    ),
    Mistake(
        what="weights that run code",
        edits=(("random", "w.pth"),),
        prepare=lambda folder: (folder / "w.pth").write_bytes(pickle.dumps(_RunsCode())),
        problem="backbones.\"test_resnet\".weights: must hold nothing but tensors, got 'FOLDER/w.pth', "
        "which is broken or holds objects that could run code; save its state_dict() as .safetensors",
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_check_refuses_wrong_backbones(folder: Path, capsys: pytest.CaptureFixture[str], mistake: Mistake) -> None:
    """A backbone or weights file that cannot be used is found before anything is decoded; nothing in it runs."""
    study_file = write_study(folder, *mistake.edits)
    mistake.prepare(folder)
    assert fail(capsys, "check", study_file) == (6, expect(folder, mistake.problem))
    assert not (folder / "pwned").exists()


def test_check_says_which_file_to_put_where_without_a_hub(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pretrained weights that cannot be fetched are named with their address and their place beside the file."""
    code, said = fail(capsys, "check", write_study(folder, *use_backbone("resnet18.a1_in1k")))
    assert code == 6
    assert said.startswith(
        f'error: backbones."resnet18.a1_in1k".weights: must be a local file while {HUB} is out of reach, got none ('
    )
    place = "weights/resnet18.a1_in1k.safetensors"
    assert said.endswith(f'); save that file as {place} beside the study file and set weights = "{place}"\n')
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("edit", "code", "problem"),
    [
        (
            ("batch_size = 4", "batch_size = 11"),
            3,
            "training.batch_size: must not exceed 10, the number of training images, got 11",
        ),
        (
            ("[training]", "unfrozen_layers = { choices = [1, 9] }\n[training]"),
            3,
            "space.unfrozen_layers.choices: must not exceed 6, the number of layer groups of test_resnet, got 9",
        ),
        (
            ('devices = "cpu"', 'devices = ["cuda:7"]'),
            9,
            "workers.devices: must name devices that exist, got 'cuda:7'; this machine shows 0 CUDA devices",
        ),
    ],
)
def test_check_refuses_what_does_not_fit(
    folder: Path, capsys: pytest.CaptureFixture[str], edit: Edit, code: int, problem: str
) -> None:
    """Numbers are compared with the images and the backbones, devices with the machine."""
    assert fail(capsys, "check", write_study(folder, edit)) == (code, expect(folder, problem))


@pytest.mark.parametrize("command", ["check", "run"])
def test_disk_that_is_too_small_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The decoded images must fit the disk before a backbone is made or an image decoded."""
    (folder / "small").mkdir()
    (folder / "small/sitecustomize.py").write_text(SMALL_DISK)
    monkeypatch.setenv("PYTHONPATH", str(folder / "small"))
    study_file = write_study(folder, ("= 16", "= 2048"))
    code, said = fail(capsys, command, study_file)
    assert code == 8
    assert re.fullmatch(
        r"error: TUNER_CACHE_DIR: must have 0\.2 GB free for the decoded images, got 0\.1 GB in '.*/pixels'; "
        r"set TUNER_CACHE_DIR or lower data\.image_size\n",
        said,
    )
