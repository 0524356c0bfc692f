"""A worker under a memory limit: what fits trains, what fits in parts trains in parts, the rest is not started."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from tests.integration.test_head_training import HEAD, Desk
from tuner.service import admission, training_session
from tuner.service.messages import Prepare, Probe, Started, Train, TrialDone
from tuner.service.study_data import read_study_data
from tuner.service.training_session import TrainingSession
from tuner.service.workbench import Workbench
from tuner.spec.study import parse_spec
from tuner.training.memory import MemoryLine, MemoryNeed
from tuner.training.memory_needs import MemoryNeeds
from tuner.trial import Repeat, TrialParams

OWN = "tests.integration.own_backbones"
LIMIT = "110 MB"
WHOLE = replace(HEAD, backbone=f"{OWN}:roomy", unfrozen_layers=3, batch_size=128, lr=0.01, epochs=1)
NORMED = replace(WHOLE, backbone=f"{OWN}:normed")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the cache in the test's folder."""
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "memory"


def make_bench(folder: Path, memory_limit: str | None = LIMIT) -> tuple[Workbench, list[str]]:
    """Return a worker's bench on three digits at 64 px, and what it notes."""
    tables: dict[str, Any] = {
        "study": {"name": "admission"},
        "data": {"source": "digits", "classes": ["7", "8", "9"], "image_size": 64},
        "space": {"lr": {"low": 1e-4, "high": 1e-1, "log": True}},
        "training": {"backbone": WHOLE.backbone, "epochs": 1, "horizontal_flip": False},
        "workers": {"prefix_cache": "never"} | ({"memory_limit": memory_limit} if memory_limit else {}),
    }
    spec = parse_spec(tables, folder)
    notes: list[str] = []
    return Workbench(spec, read_study_data(spec), device="cpu", n_threads=1, note=notes.append), notes


def train(bench: Workbench, *recipes: TrialParams, repeats: tuple[Repeat, ...] = ()) -> Desk:
    """Train recipes one after the other under the numbers 0, 1, …; return what the coordinator heard."""
    desk = Desk()
    session = TrainingSession(bench, desk)
    for number, params in enumerate(recipes):
        session.train(Train(data_hash="", members=((number, params),), uses_features=False, repeats=repeats))
    return desk


def in_process_of_its_own(test: Callable[..., None]) -> Callable[[], None]:
    """Run a test that reaches the limit in a new process: what tests before it have freed would be room below it."""

    def run_apart() -> None:
        with TemporaryDirectory() as name:
            folder = Path(name)
            call = f"from {__name__} import {test.__name__} as test; test.alone(Path({name!r}))"
            done = subprocess.run(
                [sys.executable, "-c", f"from pathlib import Path; {call}"],
                env=os.environ | {"TUNER_CACHE_DIR": str(folder / "cache")},
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 0, done.stderr

    run_apart.__name__, run_apart.__doc__ = test.__name__, test.__doc__
    run_apart.alone = test  # type: ignore[attr-defined]
    return run_apart


def read_end(done: TrialDone) -> tuple[str, str | None]:
    """Return how a trial ended."""
    return done.outcome.state.value, done.outcome.reason


@in_process_of_its_own
def test_batch_that_does_not_fit_trains_in_parts_and_is_the_same(folder: Path) -> None:
    """The same curve as without a limit, below the limit, told once; and measured once for all batches."""
    bench, notes = make_bench(folder)
    desk = train(bench, WHOLE, replace(WHOLE, lr=0.02), replace(WHOLE, batch_size=16))
    ends = desk.ends()
    assert {read_end(end) for end in ends.values()} == {("COMPLETE", None)}
    usage = ends[0].usage
    assert usage.micro_batch is not None
    assert 8 <= usage.micro_batch <= 64
    assert ends[2].usage.micro_batch is None
    assert usage.predicted_bytes is not None
    assert usage.predicted_bytes < 80e6
    assert usage.peak_bytes is None or usage.peak_bytes < 130e6
    (note,) = notes
    assert note.startswith(f"{WHOLE.backbone} with batch_size 128 would take ")
    assert note.endswith(f" of 110 MB: it trains {usage.micro_batch} images at a time and adds their gradients up")
    assert len(list((folder / "cache" / "memory").iterdir())) == 1
    free = train(make_bench(folder, None)[0], WHOLE)
    ours, theirs = desk.curve(0)[0], free.curve(0)[0]
    assert (ours.train_loss, ours.val_loss) == pytest.approx((theirs.train_loss, theirs.val_loss), rel=1e-4)


def test_batch_that_must_stay_whole_is_not_started(tmp_path: Path) -> None:
    """BatchNorm trains on whole batches: infeasible, with numbers and what to do. Frozen, at last, it does not mind."""
    bench, notes = make_bench(tmp_path)
    desk = train(bench, NORMED, replace(NORMED, batch_size=16), replace(NORMED, unfrozen_layers=1))
    ends = desk.ends()
    assert read_end(ends[0]) == ("PRUNED", "out_of_memory")
    message = ends[0].outcome.message
    assert message.startswith(f"not started, it would run out of memory: {NORMED.backbone} with batch_size 128 and 3")
    assert " of 110 MB (workers.memory_limit); smaller batches or images, or fewer unfrozen layers" in message
    assert message.endswith("its BatchNorm trains on whole batches")
    assert ends[0].usage.predicted_bytes is not None
    assert ends[0].usage.predicted_bytes > 80e6
    assert not desk.curve(0)
    assert read_end(ends[1]) == read_end(ends[2]) == ("COMPLETE", None)
    assert sum(isinstance(reply, Started) for reply in desk.replies) == 2
    assert [end.usage.micro_batch is None for end in ends.values()] == [True, True, False]
    assert len(notes) == 1


@in_process_of_its_own
def test_trial_that_runs_out_in_spite_of_its_prediction_is_the_last_of_its_like(tmp_path: Path) -> None:
    """The limit is real; what it taught is remembered by other workers and smaller batches still train."""
    too_low = MemoryNeed(
        lines=(MemoryLine(fixed_bytes=1_000_000, bytes_per_image=10_000),), gradient_bytes=0, scratch_bytes=0
    )
    bench, _ = make_bench(tmp_path)
    real_find = MemoryNeeds.find
    needs = MemoryNeeds()

    def plant(self: MemoryNeeds, facts: Any) -> MemoryNeed | None:
        if real_find(needs, facts) is None:
            needs.keep(facts, too_low)
        return real_find(self, facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryNeeds, "find", plant)
        first = train(bench, NORMED).ends()[0]
    assert read_end(first) == ("PRUNED", "out_of_memory")
    assert "can't allocate memory" in first.outcome.message
    other = train(make_bench(tmp_path)[0], NORMED, replace(NORMED, batch_size=16)).ends()
    assert other[0].outcome.message.startswith("not started")
    assert read_end(other[1]) == ("COMPLETE", None)


@in_process_of_its_own
def test_probe_that_does_not_fit_ends_the_trial_and_is_not_remembered(tmp_path: Path) -> None:
    """A limit below a few images: another study's may be higher."""
    bench, _ = make_bench(tmp_path, "2 MB")
    done = train(bench, WHOLE).ends()[0]
    assert read_end(done) == ("PRUNED", "out_of_memory")
    assert "would take even a few images at a time more than all of 2 MB" in done.outcome.message
    cache = tmp_path / "cache" / "memory"
    assert not (cache.is_dir() and list(cache.iterdir()))


def test_trials_of_several_trainings_are_admitted_one_by_one(tmp_path: Path) -> None:
    """Each seed's training is split alike."""
    desk = train(make_bench(tmp_path)[0], WHOLE, repeats=(Repeat(seed=1), Repeat(seed=2)))
    assert read_end(desk.ends()[0]) == ("COMPLETE", None)
    assert desk.ends()[0].usage.micro_batch is not None
    assert len(desk.curve(0)) == 2


def test_nothing_is_foreseen_on_a_cpu_with_memory_to_spare(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe takes time; where little memory is left it is made, and its answer heeded."""
    bench, _ = make_bench(tmp_path, None)
    small = replace(NORMED, batch_size=4)
    usage = train(bench, small).ends()[0].usage
    assert usage.predicted_bytes is None
    assert usage.peak_bytes is None
    assert not cache.exists()
    monkeypatch.setattr(admission, "available_memory", lambda: 110_000_000)
    ends = train(bench, NORMED, small).ends()
    assert read_end(ends[0]) == ("PRUNED", "out_of_memory")
    assert " (free); smaller batches" in ends[0].outcome.message
    assert read_end(ends[1]) == ("COMPLETE", None)
    assert ends[1].usage.predicted_bytes is not None


@pytest.mark.parametrize(("foreign", "learns"), [(2_000_000_000, True), (2_500_000_000, False)])
def test_what_a_neighbour_took_of_a_gpu_teaches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: int, *, learns: bool
) -> None:
    """A training that ran out because another process grew meanwhile was foreseen well."""
    bench, _ = make_bench(tmp_path, None)
    facts: dict[str, object] = {"backbone": "a test's", "image_size": 64}
    line = MemoryLine(fixed_bytes=100_000_000, bytes_per_image=0)
    need = MemoryNeed(lines=(line,), gradient_bytes=0, scratch_bytes=0)
    foreseen = admission._Foreseen(facts=facts, need=need, available=1_000_000_000, foreign=2_000_000_000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10_000_000_000 - foreign - 300_000_000, 10_000_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300_000_000)
    job = replace(TrainingSession(bench, Desk())._make_job(WHOLE), device=torch.device("cuda"))
    admission.Admission(bench)._learn(job, foreseen)
    found = MemoryNeeds().find(facts)
    assert (None if found is None else found.predict(WHOLE.batch_size)) == (
        pytest.approx(1e9, rel=1e-6) if learns else None
    )


@pytest.mark.parametrize(
    "request_", [Prepare(data_hash="", backbone=None), Probe(data_hash="", params=WHOLE, seconds=1.0)]
)
def test_worker_whose_device_is_lost_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: Prepare | Probe
) -> None:
    """Whatever it was doing: another one takes over, and no bug is reported."""

    def lose(*_: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    def end(error: Exception) -> None:
        raise SystemExit(str(error))

    session = TrainingSession(make_bench(tmp_path, None)[0], Desk())
    monkeypatch.setattr(TrainingSession, "_decode_images", lose)
    monkeypatch.setattr(session._probe, "measure", lose)
    monkeypatch.setattr(training_session, "_give_up", end)
    with pytest.raises(SystemExit, match="unspecified launch failure"):
        session.prepare(request_.backbone) if isinstance(request_, Prepare) else session.probe(request_)
