"""An interrupted trial that goes on from its checkpoint is the trial that was not interrupted, bit for bit."""

import io
import os
import pickle
import random
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from tuner.training.checkpoint import Checkpoint, CheckpointFile, identify_trial
from tuner.training.loop import TrainingJob, train_epochs
from tuner.trial import EpochResult

from .builders import CPU, TinyNet, copy_state, make_job, make_net

Curve = list[dict[str, Any]]


class NoisyNet(TinyNet):
    """Draws from every global generator in training, as a user's backbone may."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        if self.training:
            noise = torch.rand(images.shape[0], 1, 1, 1) + random.random() + np.random.random()  # noqa: NPY002, S311
            images = images * noise
        return super().forward(images)


def make_noisy() -> nn.Module:
    """Return the noisy net with weights of its own."""
    net = NoisyNet()
    net.load_state_dict(make_net().state_dict())
    return net


def make_timm(name: str, **options: Any) -> nn.Module:
    """Return a tiny model of timm's with drop-path."""
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=2, drop_path_rate=0.5, **options)


def make_file(path: Path, job: TrainingJob, **overrides: Any) -> CheckpointFile:
    """Return the job's checkpoint file, written after every epoch."""
    identity = identify_trial(job.params, CPU, made_from={"data_hash": "images"})
    options: dict[str, Any] = {"number": 3, "identity": identity, "every_seconds": 0.0, "note": pytest.fail}
    return CheckpointFile(path, **(options | overrides))


def show(results: list[EpochResult]) -> Curve:
    """Return what the epochs showed, but for how long they took."""
    timed = {"seconds", "val_seconds", "images_per_second"}
    return [{key: value for key, value in asdict(each).items() if key not in timed} for each in results]


def train(job: TrainingJob, file: CheckpointFile | None = None, saved: Checkpoint | None = None) -> Curve:
    """Train to the end and return the whole curve."""
    before = [] if saved is None else list(saved.results)
    return show([*before, *(result for result, _ in train_epochs(job, file, saved))])


def interrupt(path: Path, job: TrainingJob, *, after: int) -> bytes:
    """Train until ``after`` epochs are saved and one more is trained; return the file as it was an epoch before."""
    epochs = train_epochs(job, make_file(path, job))
    earlier = b""
    for _ in range(after + 1):
        earlier = path.read_bytes() if path.exists() else b""
        next(epochs)
    epochs.close()
    return earlier


def disturb() -> None:
    """Draw from the global generators, as other trials of the same worker do."""
    torch.rand(10)
    random.random()  # noqa: S311
    np.random.random(10)  # noqa: NPY002


def resume(path: Path, job: TrainingJob) -> Curve:
    """Go on in a worker that has drawn other numbers since."""
    disturb()
    saved = make_file(path, job, number=7).read(job.model)
    assert saved is not None
    return train(job, None, saved)


def find_differences(a: nn.Module, b: nn.Module) -> list[str]:
    """Return the names of the tensors that differ in a bit."""
    ours, theirs = copy_state(a), copy_state(b)
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


MIX: dict[str, Any] = {"dropout": 0.3, "augmentation_strength": 0.5, "warmup_fraction": 0.5, "epochs": 4}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "adamw, all at once": (make_noisy, MIX),
    "adam": (make_net, {"optimizer": "adam", "epochs": 4}),
    "sgd momentum": (make_net, {"optimizer": "sgd", "layer_decay": 0.5, "epochs": 4}),
    "fresh views": (make_net, {"augmentation_strength": 1.0, "epochs": 4}),
    "two views": (make_net, {"augmentation_strength": 1.0, "views": 2, "epochs": 4}),
    "head alone": (make_net, {"unfrozen_layers": 1, "dropout": 0.5, "epochs": 4}),
    "frozen stem": (make_net, {"unfrozen_layers": 2, "class_weights": "balanced", "epochs": 4}),
    "double": (lambda: make_net().double(), {"epochs": 4}),
    "drop-path of convolutions": (lambda: make_timm("test_resnet"), {"unfrozen_layers": 6, "epochs": 3}),
    "drop-path of a transformer": (
        lambda: make_timm("test_vit", img_size=8, patch_size=4),
        {"unfrozen_layers": 4, "epochs": 3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_trial_ends_as_the_uninterrupted_one(tmp_path: Path, case: str) -> None:
    """Weights, buffers and the whole curve agree in every bit."""
    make, options = CASES[case]
    whole, first, second = (make_job(make(), **options) for _ in range(3))
    disturb()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    curve = train(whole)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    interrupt(tmp_path / "c" / "t.pt", first, after=2)
    assert resume(tmp_path / "c" / "t.pt", second) == curve
    assert find_differences(second.model, whole.model) == []


def test_trial_may_be_interrupted_again_and_again(tmp_path: Path) -> None:
    """Each attempt goes on from the last one's checkpoint, which holds the whole curve."""
    whole = make_job(**MIX)
    curve = train(whole)
    path = tmp_path / "t.pt"
    interrupt(path, make_job(**MIX), after=1)
    again = make_job(**MIX)
    file = make_file(path, again, number=7)
    saved = file.read(again.model)
    epochs = train_epochs(again, file, saved)
    next(epochs)
    next(epochs)
    epochs.close()
    last = make_job(**MIX)
    saved = make_file(path, last).read(last.model)
    assert saved is not None
    assert (saved.number, len(saved.results)) == (7, 2)
    assert resume(path, last) == curve
    assert find_differences(last.model, whole.model) == []


def test_checkpoint_from_before_there_was_a_precision_is_used(tmp_path: Path) -> None:
    """It is of a training by the default, and of no other."""
    interrupt(tmp_path / "t.pt", make_job(), after=2)
    rewrite(tmp_path / "t.pt", lambda content: content["identity"]["params"].pop("precision"))
    job = make_job()
    assert make_file(tmp_path / "t.pt", job).read(job.model) is not None
    other, notes = make_job(precision="bfloat16"), list[str]()
    assert make_file(tmp_path / "t.pt", other, note=notes.append).read(other.model) is None
    assert "of another recipe" in notes[0]


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a checkpoint holds."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


PARTS = [
    "parameters",
    "buffers",
    "optimizer",
    "schedule",
    "generators order",
    "generators dropout",
    "global_generators torch",
    "global_generators python",
    "global_generators numpy",
]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_a_checkpoint_is_needed(tmp_path: Path, part: str) -> None:
    """With any one of them left as it was an epoch earlier, the trial ends otherwise."""
    path = tmp_path / "t.pt"
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    whole = make_job(make_noisy(), **MIX)
    train(whole)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    earlier = torch.load(io.BytesIO(interrupt(path, make_job(make_noisy(), **MIX), after=2)), weights_only=True)
    *outer, name = part.split()

    def change(content: dict[str, Any]) -> None:
        ours, older = content["state"], earlier["state"]
        for key in outer:
            ours, older = ours[key], older[key]
        ours[name] = older[name]

    rewrite(path, change)
    job = make_job(make_noisy(), **MIX)
    resume(path, job)
    assert find_differences(job.model, whole.model) != []


def test_every_part_of_a_checkpoint_is_tried(tmp_path: Path) -> None:
    """A part that is added must be shown to matter, above."""
    interrupt(tmp_path / "t.pt", make_job(), after=1)
    state = torch.load(tmp_path / "t.pt", weights_only=True)["state"]
    nested = {f"{outer} {name}" for outer in ("generators", "global_generators") for name in state[outer]}
    plain = state.keys() - {"generators", "global_generators", "frozen_hash"}
    assert plain | nested - {"global_generators cuda"} == set(PARTS)


# --- when it is written ---


def test_train_epochs_saves_when_it_is_due_and_never_at_the_end(tmp_path: Path) -> None:
    """Too early for the first one, and nothing to go on to after the last epoch."""
    job = make_job(epochs=2)
    train(job, make_file(tmp_path / "rare.pt", job, every_seconds=3600.0))
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "t.pt"
    job = make_job(epochs=2)
    train(job, make_file(path, job))
    saved = make_file(path, job).read(make_net())
    assert saved is not None
    assert [result.epoch for result in saved.results] == [1]
    assert [each.name for each in tmp_path.iterdir()] == ["t.pt"]


def test_checkpoint_holds_frozen_weights_as_a_hash(tmp_path: Path) -> None:
    """Where little trains, little is written."""
    sizes = []
    for unfrozen_layers in (1, 3):
        path = tmp_path / f"{unfrozen_layers}.pt"
        interrupt(path, make_job(unfrozen_layers=unfrozen_layers), after=1)
        sizes.append(len(torch.load(path, weights_only=True)["state"]["parameters"]))
    assert sizes == [2, 10]


@contextmanager
def limited_files(n_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_keeps_the_last_checkpoint_and_the_trial(tmp_path: Path) -> None:
    """One line for the user, however often it fails; the curve is that of any other trial."""
    path, notes = tmp_path / "t.pt", list[str]()
    curve = train(make_job())
    interrupt(path, make_job(), after=1)
    before = path.read_bytes()
    job = make_job()
    with limited_files(len(before) // 2):
        assert train(job, make_file(path, job, note=notes.append)) == curve
    assert notes == ["trial 3 goes on without a new checkpoint: File too large"]
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["t.pt"]


def test_folder_that_cannot_be_made_costs_the_checkpoint_alone(tmp_path: Path) -> None:
    """A file lies where the folder should be."""
    (tmp_path / "c").touch()
    job, notes = make_job(), list[str]()
    assert len(train(job, make_file(tmp_path / "c" / "t.pt", job, note=notes.append))) == 4
    assert notes == ["trial 3 goes on without a new checkpoint: File exists"]


# --- what is never used ---


def read_notes(path: Path, job: TrainingJob, **overrides: Any) -> list[str]:
    """Read a checkpoint that must not be used; return what the user is told."""
    notes: list[str] = []
    assert make_file(path, job, note=notes.append, **overrides).read(job.model) is None
    return notes


def test_read_finds_nothing_in_silence(tmp_path: Path) -> None:
    """Most trials have no checkpoint."""
    assert read_notes(tmp_path / "c" / "t.pt", make_job()) == []


def flip_bits(content: bytes) -> Iterator[bytes]:
    """Yield a file with a bit flipped in each of its parts."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = archive.infolist()
    for part in parts:
        n_name, n_extra = struct.unpack_from("<HH", content, part.header_offset + 26)  # of its local header
        flipped = bytearray(content)
        flipped[part.header_offset + 30 + n_name + n_extra + part.file_size // 2] ^= 4
        yield bytes(flipped)


def test_read_notices_what_is_torn_or_flipped(tmp_path: Path) -> None:
    """Any length, and a bit in any part: the trial starts at epoch 1, and says so in one line."""
    path = tmp_path / "t.pt"
    interrupt(path, make_job(), after=1)
    content = path.read_bytes()
    cuts = [content[:n_bytes] for n_bytes in (0, 1, 100, len(content) // 2, len(content) - 1)]
    zeros = content[: len(content) // 2] + bytes(len(content) - len(content) // 2)
    for damaged in (*cuts, zeros, b"garbage" * 1000, *flip_bits(content)):
        path.write_bytes(damaged)
        (note,) = read_notes(path, make_job())
        assert note.startswith("trial 3 starts at epoch 1, its checkpoint cannot be used: ")
        assert "\n" not in note
    path.write_bytes(content)
    assert make_file(path, make_job()).read(make_net()) is not None


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        """Make a folder."""
        return os.mkdir, (str(self.folder),)


def test_read_runs_no_code_of_a_foreign_file(tmp_path: Path) -> None:
    """Neither from torch's format nor from a bare pickle."""
    path, sprung = tmp_path / "t.pt", tmp_path / "sprung"
    torch.save({"identity": Trap(sprung)}, path)
    assert len(read_notes(path, make_job())) == 1
    path.write_bytes(pickle.dumps(Trap(sprung)))
    assert len(read_notes(path, make_job())) == 1
    torch.save(torch.zeros(3), path)
    assert len(read_notes(path, make_job())) == 1
    assert not sprung.exists()


def test_read_refuses_another_trials_checkpoint(tmp_path: Path) -> None:
    """Of another recipe, seed included, of other images, or of another kind of device."""
    path = tmp_path / "t.pt"
    interrupt(path, make_job(), after=1)
    expected = "it is of another recipe, other images, another kind of device or another version"
    same, made_from = make_job().params, {"data_hash": "images"}
    for identity in (
        identify_trial(replace(same, seed=8), CPU, made_from=made_from),
        identify_trial(same, CPU, made_from={"data_hash": "others"}),
        identify_trial(same, CPU, made_from=made_from | {"image_size": 96}),
        identify_trial(same, torch.device("cuda", 0), made_from=made_from),
        identify_trial(same, CPU, made_from=made_from) | {"format": 1},
    ):
        (note,) = read_notes(path, make_job(), identity=identity)
        assert note.endswith(expected)


def test_read_refuses_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    """A user's backbone may have changed between two runs: what trains, or what does not."""
    path = tmp_path / "t.pt"
    interrupt(path, make_job(unfrozen_layers=1), after=1)
    (note,) = read_notes(path, make_job(make_net(n_classes=3), unfrozen_layers=1))
    assert note.endswith("its weights are of another model")
    (note,) = read_notes(path, make_job(make_net(seed=1), unfrozen_layers=1))
    assert note.endswith("the weights that do not train have changed")
