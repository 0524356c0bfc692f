"""Where a worker's features come from: which are trusted, which are kept, and what makes room for whole models."""

import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.integration import own_backbones
from tests.integration.test_head_training import HEAD, OWN, Desk
from tuner.data.cache import clear_cache
from tuner.service import describing, messages, open_banks, training_session
from tuner.service.describing import describe_study
from tuner.service.messages import GivenBack, Reply, Train
from tuner.service.open_banks import OpenBanks, choose_closed
from tuner.service.study_data import StudyData, read_study_data
from tuner.service.training_session import TrainingSession
from tuner.service.workbench import Workbench
from tuner.spec.sections import StudySpec
from tuner.spec.study import parse_spec

DATA = {"source": "digits", "classes": ["7", "8", "9"], "image_size": 16}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))


def read_study(folder: Path, backbone: str = HEAD.backbone, **tables: Any) -> tuple[StudySpec, StudyData]:
    """Return a study of three digits, some of its tables replaced."""
    defaults: dict[str, Any] = {
        "study": {"name": "heads", "seed": 5},
        "data": DATA,
        "space": {"lr": {"low": 1e-4, "high": 1e-1, "log": True}},
        "training": {"backbone": backbone, "unfrozen_layers": 1, "epochs": 2, "horizontal_flip": False},
    }
    spec = parse_spec(defaults | tables, folder)
    return spec, read_study_data(spec)


@dataclass(kw_only=True)
class Worker:
    """A worker of a study, and what it says."""

    folder: Path
    backbone: str = HEAD.backbone
    tables: dict[str, Any] = field(default_factory=dict)
    desk: Desk = field(default_factory=Desk)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        spec, data = read_study(self.folder, self.backbone, **self.tables)
        self.bench = Workbench(spec, data, device="cpu", n_threads=1, note=self.notes.append)
        self.session = TrainingSession(self.bench, self.desk)

    def train(self, *, uses_features: bool = True, **overrides: Any) -> Reply:
        """Train one recipe; return what is said last."""
        recipe = replace(HEAD, backbone=self.backbone, **overrides)
        self.session.train(Train(data_hash="", members=((0, recipe),), uses_features=uses_features))
        return self.desk.replies[-1]

    def name_use(self, **overrides: Any) -> str | None:
        """Train one recipe; return whether its features were computed or there."""
        self.train(**overrides)
        return self.desk.ends()[0].usage.features


VIEWS = {"augmentation_strength": 0.5, "views": 2, "view_seed": 5}


@pytest.mark.parametrize("overrides", [{}, VIEWS])
def test_features_of_code_that_was_edited_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any]
) -> None:
    """The tensors of a backbone do not tell what its forward does."""
    assert Worker(folder=tmp_path).name_use(**overrides) == "computed"
    assert Worker(folder=tmp_path).name_use(**overrides) == "cached"
    monkeypatch.setattr(own_backbones, "FACTOR", 1.01)
    edited = Worker(folder=tmp_path)
    assert edited.name_use(**overrides) == "computed"
    assert Worker(folder=tmp_path).name_use(**overrides) == "cached"
    on_images = Worker(folder=tmp_path)
    on_images.train(uses_features=False, **overrides)
    expected = [each.val_loss for each in on_images.desk.curve(0)]
    assert [each.val_loss for each in edited.desk.curve(0)] == pytest.approx(expected, rel=1e-4)


def test_features_of_a_file_that_was_edited_are_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a few images show: in bfloat16 a small change lies within the noise."""
    file = tmp_path / f"edited_{tmp_path.name}.py"
    file.write_text(
        "from tests.integration import own_backbones\nmake = lambda num_classes: own_backbones.plain(num_classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    backbone = f"{file.stem}:make"
    training = {"backbone": backbone, "unfrozen_layers": 1, "epochs": 2, "precision": "bfloat16"}

    def start() -> Worker:
        return Worker(folder=tmp_path, backbone=backbone, tables={"training": training})

    assert [start().name_use(precision="bfloat16") for _ in range(2)] == ["computed", "cached"]
    file.write_text(file.read_text() + "# edited\n")
    monkeypatch.delitem(sys.modules, file.stem)  # as in a new process
    assert start().name_use(precision="bfloat16") == "computed"


def test_heads_of_a_body_with_a_random_tensor_of_its_own_are_given_back(tmp_path: Path) -> None:
    """Neither a parameter nor a buffer, it is in no state dict, and still drawn from each trial's seed."""
    reply = Worker(folder=tmp_path, backbone=f"{OWN}:shifting").train()
    assert isinstance(reply, GivenBack)
    assert (reply.reason, reply.is_lasting) == ("its weights are drawn anew for every trial", True)


def test_heads_are_given_back_if_their_features_fit_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the cache nor the memory has room: images serve as well."""
    monkeypatch.setenv("TUNER_CACHE_GB", "0")
    monkeypatch.setattr("tuner.data.feature_store._MEMORY_FRACTION", 0)
    reply = Worker(folder=tmp_path).train()
    assert isinstance(reply, GivenBack)
    assert reply.reason == "its features take 0.0 GB, more than the cache (TUNER_CACHE_GB) and memory allow"
    assert reply.is_lasting


def test_features_that_are_not_kept_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker holds them in its memory, and says what would help."""
    monkeypatch.setenv("TUNER_CACHE_GB", "0")
    worker = Worker(folder=tmp_path)
    assert worker.name_use() == "computed"
    assert worker.name_use() == "cached"
    (note,) = worker.notes
    assert note.startswith(f"features of {OWN}:plain are not kept: ")
    assert "TUNER_CACHE_GB" in note


def test_features_that_are_not_kept_take_a_share_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for all of them those used longest ago are let go; mapped ones take none."""
    monkeypatch.setattr(open_banks, "_HOST_FRACTION", 0)
    monkeypatch.setenv("TUNER_CACHE_GB", "0")
    worker = Worker(folder=tmp_path)
    assert [worker.name_use(), worker.name_use()] == ["computed", "computed"]
    monkeypatch.delenv("TUNER_CACHE_GB")
    worker = Worker(folder=tmp_path)
    assert worker.name_use() == "computed"
    clear_cache(["features"])
    assert worker.name_use() == "cached"


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ((), 0, ()),
        ((5,), 0, ()),
        ((5, 5), 10, ()),
        ((5, 5), 9, (0,)),
        ((5, 0, 3, 4), 4, (0, 2)),
        ((5, 0, 3, 4), 7, (0,)),
        ((0, 0, 9), 1, ()),
    ],
)
def test_choose_closed_lets_go_of_the_oldest(sizes: tuple[int, ...], limit: float, expected: tuple[int, ...]) -> None:
    """As many as it takes, none that take nothing, and never the one in use."""
    assert choose_closed(sizes, limit) == expected


@pytest.mark.parametrize(("device", "expected"), [("cuda", "computed"), ("cpu", "cached")])
def test_whole_models_take_the_place_of_features_on_a_gpu(tmp_path: Path, device: str, expected: str) -> None:
    """A request without features makes a worker forget those that it holds there; on the CPU they are in no way."""
    worker = Worker(folder=tmp_path)
    worker.name_use()
    clear_cache(["features"])
    worker.bench.device = torch.device(device)
    worker.session.train(Train(data_hash="", members=(), uses_features=False))
    worker.bench.device = torch.device("cpu")
    assert worker.name_use() == expected


def test_pretrained_weights_that_have_gone_are_made_again(tmp_path: Path) -> None:
    """Who clears the cache during a study costs it time, not its trials."""
    pretraining = {"data": DATA | {"classes": ["0", "1"]}, "epochs": 1}
    worker = Worker(folder=tmp_path, tables={"pretraining": pretraining})
    worker.session.prepare(HEAD.backbone)
    assert clear_cache(["pretrained"]) > 0
    worker.train(uses_features=False)
    assert worker.desk.ends()[0].outcome.state == "COMPLETE"
    said = f"the pretrained weights of {HEAD.backbone} have gone from the cache; it is pretrained again"
    assert worker.notes[-1] == said
    clear_cache(["pretrained"])
    worker.train(uses_features=False)  # from memory
    assert worker.notes.count(said) == 1


def test_images_are_decoded_with_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else happens meanwhile: the other workers wait for them."""

    def count_threads() -> int:
        return sum("ThreadPool" in thread.name for thread in threading.enumerate())

    n_before, n_decoding = count_threads(), 0

    class Watcher(Desk):
        def send(self, reply: Reply) -> None:
            nonlocal n_decoding
            super().send(reply)
            n_decoding = max(n_decoding, count_threads() - n_before)

    monkeypatch.setattr(messages, "PROGRESS_SECONDS", -1)
    monkeypatch.setattr(training_session, "usable_cores", lambda: 3)
    Worker(folder=tmp_path, desk=Watcher()).session.prepare(None)
    assert n_decoding == 3


@pytest.mark.parametrize(
    ("strength", "views", "expected"),
    [
        ({"low": 0.0, "high": 1.0}, 4, True),
        ({"low": 0.0, "high": 1.0, "step": 0.25}, 4, False),
        ({"choices": [0.0, 0.5]}, 4, False),
        ({"low": 0.0, "high": 1.0}, "fresh", False),
    ],
)
def test_check_says_that_no_two_heads_share_an_augmentation_strength(
    tmp_path: Path, strength: dict[str, Any], views: Any, *, expected: bool
) -> None:
    """A continuous strength makes every trial compute views of its own."""
    lr = {"low": 1e-4, "high": 1e-1, "log": True}
    training = {"backbone": "tuner:small_cnn", "unfrozen_layers": 1, "views": views}
    study = read_study(tmp_path, space={"lr": lr, "augmentation_strength": strength}, training=training)
    notes = describe_study(*study, timed=False).notes
    assert any("needs features of its own for 4 views" in note for note in notes) is expected


def test_banks_that_stay_on_the_host_take_no_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 bytes, 60 free: a bank of more than 20 stays on the host, and the others share 20."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60, 100))
    banks = OpenBanks(SimpleNamespace(device=torch.device("cuda")), Desk())  # type: ignore[arg-type]

    def count(*sizes: int) -> int:
        return banks.count_later(SimpleNamespace(name=size, n_bytes=size) for size in sizes)  # type: ignore[misc]

    assert count(21, 1000) == 0
    assert count(5, 9, 1000) == 14
    assert count(15, 16) == 20
    on_host = OpenBanks(SimpleNamespace(device=torch.device("cpu")), Desk())  # type: ignore[arg-type]
    assert on_host.count_later([SimpleNamespace(name="a", n_bytes=1000)]) == 1000  # type: ignore[list-item]


def test_features_of_another_precision_are_others(tmp_path: Path) -> None:
    """Those of float32 are near enough to pass for bfloat16's, and are kept in the same type."""

    def start(precision: str) -> Worker:
        training = {"backbone": HEAD.backbone, "unfrozen_layers": 1, "epochs": 2, "precision": precision}
        return Worker(folder=tmp_path, tables={"training": training})

    for precision in ("float32", "bfloat16"):
        assert start(precision).name_use(precision=precision) == "computed"
        assert start(precision).name_use(precision=precision) == "cached"


def test_bfloat16_on_a_cpu_without_instructions_for_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be emulated, and slow."""
    training = {"backbone": HEAD.backbone, "epochs": 2, "precision": "bfloat16"}
    spec, data = read_study(tmp_path, training=training)
    for lacks in (True, False):
        monkeypatch.setattr(describing, "lacks_bfloat16", lambda lacks=lacks: lacks)
        notes = describe_study(spec, data, timed=True).notes
        assert any("this CPU has no instructions for it" in note for note in notes) is lacks


@pytest.mark.parametrize(
    ("precision", "image_size", "has_units", "is_told"),
    [
        ("auto", 96, True, True),
        ("auto", 96, False, False),
        ("auto", 32, True, False),
        ("float32", 96, True, False),
        ("bfloat16", 96, True, False),
    ],
)
def test_matrix_units_of_a_cpu_are_told_to_whoever_leaves_the_precision_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, image_size: int, *, has_units: bool, is_told: bool
) -> None:
    """Nothing changes by itself: which units a machine has would decide what a study finds."""
    monkeypatch.setattr(describing, "multiplies_in_bfloat16", lambda: has_units)
    training = {"backbone": HEAD.backbone, "epochs": 2, "precision": precision}
    spec, data = read_study(tmp_path, training=training, data=DATA | {"image_size": image_size})
    notes = describe_study(spec, data, timed=False).notes
    assert any("this CPU has matrix units for bfloat16" in note for note in notes) is is_told
