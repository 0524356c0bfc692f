"""``tuner run`` with ``workers.memory_limit``: no trial dies of it."""

import json
from pathlib import Path

from tests.e2e.harness import make_place
from tests.e2e.test_run import assert_is_whole, read_study

_ROOMY = """

class Roomy(nn.Module):
    def __init__(self, num_classes, norm):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = norm
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, images):
        maps = torch.relu(self.norm(self.stem(images)))
        return self.fc(torch.relu(self.body(maps)).mean((2, 3)))


def roomy(num_classes):
    return Roomy(num_classes, nn.Identity())


def normed(num_classes):
    return Roomy(num_classes, nn.BatchNorm2d(16))
"""


def test_run_under_a_memory_limit_splits_or_refuses_large_batches(tmp_path: Path) -> None:
    """Large batches train in parts or are infeasible before their first step; none runs out while training."""
    place = make_place(tmp_path, backbones=("own:roomy", "own:normed"), epochs=1, n_trials=12)
    own = tmp_path / "own.py"
    own.write_text(own.read_text() + _ROOMY)
    text = place.study_file.read_text().replace("image_size = 16", "image_size = 64")
    text = text.replace("batch_size = 64\n", "")
    text = text.replace("[training]", "batch_size = { choices = [8, 160] }\n[training]")
    place.study_file.write_text(text.replace("[workers]", '[workers]\nmemory_limit = "110 MB"'))
    code, output = place.run()
    assert code == 0, output
    assert "own:roomy with batch_size 160 would take" in output
    assert_is_whole(place, 12)
    trials = read_study(place).trials
    large = [trial for trial in trials if trial.params["batch_size"] == 160]
    refused = [trial for trial in large if trial.params["backbone"] == "own:normed"]
    split = [trial for trial in large if trial.params["backbone"] == "own:roomy"]
    assert refused
    assert split
    assert all(trial.user_attrs["message"].startswith("not started, it would run") for trial in refused)
    assert all(max(trial.constraints.values()) > 0 for trial in refused)
    assert all(trial.user_attrs["micro_batch"] < 160 and trial.state.name == "COMPLETE" for trial in split)
    assert all("micro_batch" not in trial.user_attrs for trial in trials if trial.params["batch_size"] == 8)
    assert not [trial for trial in trials if "can't allocate" in trial.user_attrs.get("message", "")]
    code, output = place.call("cache", "--json")
    assert [entry["text"] for entry in json.loads(output)["entries"] if entry["kind"] == "memory"], output


def test_run_refuses_a_limit_without_a_unit(tmp_path: Path) -> None:
    """A bare 4 is a mistake that would end every trial."""
    place = make_place(tmp_path)
    place.study_file.write_text(place.study_file.read_text().replace("[workers]", "[workers]\nmemory_limit = 4"))
    code, output = place.call("run", str(place.study_file))
    assert code == 3
    assert 'workers.memory_limit: must be a size such as "4 GB" or "512 MB", at least 1 MB, got 4' in output
