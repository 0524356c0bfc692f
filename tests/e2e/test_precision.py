"""What the study file says of precision holds for every number that a study and its model give."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.e2e.harness import Place
from tests.e2e.test_run import read_study

_WATCHED = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, stride=2)
        self.middle = nn.Conv2d(6, 8, 3)
        self.fc = nn.Linear(8, num_classes)
        for module in (self.stem, self.middle, self.fc):
            module.register_forward_hook(lambda _, inputs, output: check(output, dtype))
        for parameter in (*self.stem.parameters(), *self.middle.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4

    def forward(self, images):
        return self.fc(torch.relu(self.middle(torch.relu(self.stem(images)))).mean((2, 3)))


def check(output, dtype):
    if len(output) > 8 and output.dtype != dtype:  # on a few images a backbone is tried, in full
        raise ValueError(f"computed in {output.dtype}")


def rounded(num_classes):
    return Net(num_classes, torch.bfloat16)


def exact(num_classes):
    return Net(num_classes, torch.float32)
"""

_STUDY = """
[study]
name = "digits"
[data]
source = "digits"
classes = ["7", "8", "9"]
image_size = 16
test_fraction = 0.2
[space]
unfrozen_layers = {{ low = 1, high = 3 }}
augmentation_strength = {{ choices = [0.0, 0.5] }}
[training]
backbone = "own:{backbone}"
lr = 0.01
batch_size = 32
epochs = 2
views = 2
{precision}
horizontal_flip = false
[search]
sampler = "grid"
pruner = "none"
n_trials = 6
[workers]
devices = "cpu"
prefix_cache = "always"
"""


def make_place(folder: Path, backbone: str, precision: str = "") -> Place:
    """Write a study of every cut of a backbone that computes in one type alone."""
    (folder / "own.py").write_text(_WATCHED)
    study_file = folder / "digits.toml"
    study_file.write_text(_STUDY.format(backbone=backbone, precision=precision))
    return Place(folder=folder, study_file=study_file)


def test_bfloat16_holds_from_the_search_to_production(tmp_path: Path) -> None:
    """Trials on images, on maps and on features, confirmed, trained, verified, evaluated and in use."""
    place = make_place(tmp_path, "rounded", 'precision = "bfloat16"')
    code, output = place.run()
    assert code == 0, output
    assert "its frozen layers are computed in every epoch" not in output
    assert "heads train on images" not in output
    trials = read_study(place).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 6
    assert {trial.user_attrs["params_resolved"]["precision"] for trial in trials} == {"bfloat16"}
    kept = {trial.params["unfrozen_layers"]: trial.user_attrs["features"] for trial in trials}
    assert [kept[n_unfrozen] != "none" for n_unfrozen in (1, 2, 3)] == [True, True, False]
    for command in (
        ("confirm", "digits", "--top", "2", "--seeds", "2"),
        ("train", "digits", "--out", "model", "--device", "cpu"),
        ("verify", "model", "--runs", "1", "--device", "cpu"),
        ("evaluate", "model", "--device", "cpu"),
    ):
        code, output = place.call(*command, "--allow-code")
        assert code == 0, output
    names = [f"{number}.png" for number in range(10)]
    for name in names:
        Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(tmp_path / name)
    code, output = place.call("predict", "model", *names, "--json", "--device", "cpu", "--allow-code")
    assert code == 0, output
    assert len(json.loads(output)) == len(names)


def test_on_a_cpu_a_study_that_says_nothing_computes_in_float32(tmp_path: Path) -> None:
    """All bits are promised there."""
    place = make_place(tmp_path, "exact")
    code, output = place.run()
    assert code == 0, output
    assert [trial.state.name for trial in read_study(place).trials] == ["COMPLETE"] * 6
