"""Lone trials on kept maps of their frozen layers: the same trial, computed once, and never where it is not exact."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration import own_backbones
from tests.integration.test_feature_banks import Worker
from tests.integration.test_head_training import HEAD, OWN, Desk
from tuner.data.cache import clear_cache, list_entries
from tuner.data.locks import is_mapped
from tuner.service import earlier_cuts, open_banks, prefix_banks, prefix_payoff
from tuner.service.admission import Admission, DoesNotFit
from tuner.service.messages import EpochDone, Train, Verdict
from tuner.spec.sizes import parse_size
from tuner.training import step_graphs
from tuner.training.head_features import N_TRIED
from tuner.training.loop import TrainingJob
from tuner.training.memory import MemoryLine, MemoryNeed
from tuner.training.memory_needs import MemoryNeeds
from tuner.training.prefix_cost import PrefixCost
from tuner.training.prefix_maps import compute_maps
from tuner.training.step_graphs import Step, StepGraphs
from tuner.trial import TrialParams

DEEP = replace(HEAD, backbone=f"{OWN}:deep", unfrozen_layers=2, epochs=3)
VIEWS = replace(DEEP, augmentation_strength=0.5, views=2, view_seed=5)
SLOW = PrefixCost(compute_seconds=1.0, keep_seconds=0.1, take_seconds=0.1, bank_seconds=0.1)
CHEAP = replace(SLOW, compute_seconds=0.01)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))


def start(folder: Path, cache: str = "always", name: str = "deep", desk: Desk | None = None, **tables: Any) -> Worker:
    """Return a worker of a study on a backbone of the user's own."""
    workers = {"prefix_cache": cache} | tables
    return Worker(folder=folder, backbone=f"{OWN}:{name}", tables={"workers": workers}, desk=desk or Desk())


def train(worker: Worker, params: TrialParams, number: int = 0, **request: Any) -> str:
    """Train one recipe; return whether its maps were computed or there, or none."""
    params = replace(params, backbone=worker.backbone)
    worker.session.train(Train(data_hash="", members=((number, params),), uses_features=False, **request))
    end = worker.desk.ends()[number]
    assert end.outcome.state == "COMPLETE", end.outcome
    return end.usage.features


def list_losses(worker: Worker, number: int = 0) -> list[float]:
    """Return the losses that a trial showed."""
    return [loss for each in worker.desk.curve(number) for loss in (each.train_loss, each.val_loss)]


@pytest.mark.parametrize("params", [DEEP, VIEWS], ids=["plain", "views"])
def test_trial_on_kept_maps_is_the_trial_on_images(tmp_path: Path, params: TrialParams) -> None:
    """Computed, found by another worker, or not kept at all: the same curve."""
    workers = [start(tmp_path), start(tmp_path), start(tmp_path, "never")]
    assert [train(worker, params) for worker in workers] == ["computed", "cached", "none"]
    cold, warm, plain = (list_losses(worker) for worker in workers)
    assert warm == cold
    assert warm == pytest.approx(plain, rel=1e-4)
    assert workers[1].desk.ends()[0].usage.saved_seconds > 0
    assert len([entry for entry in list_entries() if entry.kind == "features"]) == (3 if params is VIEWS else 2)


def test_trials_of_other_recipes_share_maps(tmp_path: Path) -> None:
    """Learning rate, batch size and seed do not matter to frozen layers; the cut does."""
    worker = start(tmp_path)
    assert train(worker, VIEWS) == "computed"
    assert train(worker, replace(VIEWS, lr=1e-3, batch_size=8, seed=9), 1) == "cached"
    assert train(worker, replace(VIEWS, epochs=1), 2) == "cached"
    assert train(worker, replace(VIEWS, unfrozen_layers=1), 3) == "computed"


CUTS = (1, 2, 3)


def watch_images(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of images that prefixes are computed on from now on, but for the few of a comparison."""
    seen: list[int] = []

    def watch(model: Any, partition: Any, images: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        if len(images.labels) > N_TRIED:
            seen.append(len(images.labels))
        return compute_maps(model, partition, images, *arguments, **options)

    monkeypatch.setattr(prefix_banks, "compute_maps", watch)
    return seen


@pytest.mark.parametrize("params", [DEEP, VIEWS], ids=["plain", "views"])
@pytest.mark.parametrize("order", [(2, 1), (1, 2)], ids=["earlier first", "later first"])
def test_maps_of_a_later_cut_follow_from_those_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, params: TrialParams, order: tuple[int, int]
) -> None:
    """Whichever is asked for first, the images go through the layers below both once, and every trial is its own."""
    seen = watch_images(monkeypatch)
    worker, plain = start(tmp_path), start(tmp_path, "never")
    for number, unfrozen in enumerate(order):
        own = replace(params, unfrozen_layers=unfrozen)
        assert train(worker, own, number, cuts=CUTS) != "none"
        train(plain, own, number)
        assert list_losses(worker, number) == pytest.approx(list_losses(plain, number), rel=1e-4)
    n_train, n_val = (len(images.labels) for images in worker.bench.load_images("bilinear"))
    assert sorted(seen) == sorted([n_val, *[n_train] * (2 if params is VIEWS else 1)])


def test_earlier_maps_are_left_out_where_the_cache_cannot_hold_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would evict what they are made for."""
    own = replace(DEEP, unfrozen_layers=1)
    worker = start(tmp_path)
    n_images = sum(len(images.labels) for images in worker.bench.load_images("bilinear"))
    monkeypatch.setattr(prefix_banks, "budget_bytes", lambda: 2 * n_images * 8 * 4)  # a head's input: 8 numbers
    assert train(worker, own, cuts=CUTS) == "computed"
    assert len([entry for entry in list_entries() if entry.kind == "features"]) == 2


def leave_empty(*_: Any, out: torch.Tensor, **__: Any) -> None:
    """Fill a bank with what no image gives."""
    out.zero_()


def fail(*_: Any, **__: Any) -> None:
    """Fail as a layer does that relies on how numbers lie in memory."""
    raise RuntimeError("view size is not compatible")


@pytest.mark.parametrize("way", [leave_empty, fail])
def test_maps_that_do_not_follow_are_computed_from_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[..., None]
) -> None:
    """What an earlier cut leads to is compared with what a few images give; where it does not run, nobody is told."""
    monkeypatch.setattr(prefix_banks, "continue_maps", way)
    seen = watch_images(monkeypatch)
    worker, plain = start(tmp_path), start(tmp_path, "never")
    own = replace(DEEP, unfrozen_layers=1)
    assert [train(worker, own, cuts=CUTS), train(plain, own)] == ["computed", "none"]
    assert list_losses(worker) == pytest.approx(list_losses(plain), rel=1e-4)
    assert len(seen) == 3  # both splits, and the one that an earlier cut was tried with
    assert worker.notes == []


def test_early_maps_are_not_made_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who wants maps of every cut wants those of the cuts that trials have, not larger ones that lead to them."""
    monkeypatch.setattr(earlier_cuts, "_MAX_IMAGES", 0)
    assert train(start(tmp_path), replace(DEEP, unfrozen_layers=1), cuts=CUTS) == "computed"
    assert len([entry for entry in list_entries() if entry.kind == "features"]) == 2


def test_bank_in_use_leaves_the_cache_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker has mapped cannot be evicted, so it lets go of all but the last beyond its share."""
    monkeypatch.setattr(open_banks, "_CACHE_FRACTION", 0.0)
    worker = start(tmp_path)
    assert [train(worker, VIEWS), train(worker, VIEWS, 1)] == ["computed", "cached"]
    assert sum(is_mapped(entry.path) for entry in list_entries() if entry.kind == "features") == 1


def test_maps_of_code_that_was_edited_are_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of a backbone do not tell what its forward does."""
    assert [train(start(tmp_path), DEEP), train(start(tmp_path), DEEP)] == ["computed", "cached"]
    monkeypatch.setattr(own_backbones, "FACTOR", 1.01)
    edited, plain = start(tmp_path), start(tmp_path, "never")
    assert [train(edited, DEEP), train(plain, DEEP)] == ["computed", "none"]
    assert list_losses(edited) == pytest.approx(list_losses(plain), rel=1e-4)


@pytest.mark.parametrize(
    "params", [replace(DEEP, unfrozen_layers=3), replace(DEEP, augmentation_strength=0.5, views="fresh")]
)
def test_trial_without_a_known_frozen_part_trains_on_images_unsaid(tmp_path: Path, params: TrialParams) -> None:
    """All layers train, or every epoch shows new images: nobody is at fault."""
    worker = start(tmp_path)
    assert train(worker, params) == "none"
    assert worker.notes == []


def test_random_weights_are_no_fault_of_the_backbone(tmp_path: Path) -> None:
    """Its frozen layers are others in every trial because the study file says so: nothing is tried, nothing is told."""
    tables = {"backbones": {"test_resnet": {"weights": "random"}}, "workers": {"prefix_cache": "always"}}
    worker = Worker(folder=tmp_path, backbone="test_resnet", tables=tables)
    assert train(worker, DEEP) == "none"
    assert worker.notes == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("branching", "its forward pass cannot be traced (TraceError: "),
        ("drawing", "its frozen part draws random numbers in train mode"),
        ("redrawn", "its frozen layers are drawn anew for every trial"),
        ("skipping", "its frozen part draws random numbers in train mode"),
        ("striding", "view size is not compatible"),
        ("uncopied", "its forward pass cannot be traced (RuntimeError: Only Tensors created explicitly"),
    ],
)
def test_backbone_that_cannot_be_cut_trains_on_images_and_is_told_once(tmp_path: Path, name: str, reason: str) -> None:
    """Each trial completes as it would without a cache."""
    worker, plain = start(tmp_path, name=name), start(tmp_path, "never", name=name)
    assert [train(worker, DEEP), train(worker, DEEP, 1), train(plain, DEEP)] == ["none"] * 3
    (note,) = worker.notes
    assert note.startswith(f"{OWN}:{name}, 2 unfrozen layers: its frozen layers are computed in every epoch: {reason}")
    assert list_losses(worker) == list_losses(plain)


@pytest.mark.parametrize(
    ("cost", "n_sharing", "expected"), [(SLOW, 0.0, "computed"), (CHEAP, 0.0, "none"), (CHEAP, 1e6, "none")]
)
def test_maps_are_kept_where_that_pays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cost: PrefixCost, n_sharing: float, expected: str
) -> None:
    """By the times that were measured: where fetching maps costs more than the prefix, never."""
    monkeypatch.setattr(prefix_payoff, "measure_cost", lambda *_, **__: cost)
    assert train(start(tmp_path, "auto"), DEEP, n_sharing=n_sharing) == expected


def test_maps_that_one_trial_does_not_repay_are_kept_for_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one epoch for each view a trial alone saves nothing; those that come after it do."""
    monkeypatch.setattr(prefix_payoff, "measure_cost", lambda *_, **__: SLOW)
    params = replace(VIEWS, epochs=1)
    assert train(start(tmp_path, "auto"), params) == "none"
    assert train(start(tmp_path, "auto"), params, n_sharing=3.0) == "computed"


def test_early_cut_is_left_alone_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its maps are larger than a few images, save little and fill the cache."""
    monkeypatch.setattr(prefix_payoff, "measure_cost", lambda *_, **__: SLOW)
    monkeypatch.setattr(earlier_cuts, "_MAX_IMAGES", 0)
    assert train(start(tmp_path, "auto"), DEEP) == "none"
    assert train(start(tmp_path, "always"), DEEP) == "computed"


def test_maps_without_room_in_the_cache_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker holds them, and says what would help."""
    monkeypatch.setenv("TUNER_CACHE_GB", "0")
    worker = start(tmp_path)
    assert [train(worker, DEEP), train(worker, DEEP, 1)] == ["computed", "cached"]
    assert [note.partition(":")[0] for note in worker.notes] == [f"maps of {OWN}"]


def test_maps_without_room_anywhere_are_computed_in_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the cache nor the memory has room: images serve as well."""
    monkeypatch.setenv("TUNER_CACHE_GB", "0")
    monkeypatch.setattr("tuner.data.feature_store._MEMORY_FRACTION", 0)
    worker = start(tmp_path)
    assert train(worker, DEEP) == "none"
    assert worker.notes[0].endswith("its maps take 0.0 GB, more than the cache (TUNER_CACHE_GB) and memory allow")


def test_want_of_room_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once, and what finds room later is kept."""
    worker = start(tmp_path)
    monkeypatch.setenv("TUNER_CACHE_GB", "0")
    with monkeypatch.context() as full:
        full.setattr("tuner.data.feature_store._MEMORY_FRACTION", 0)
        assert [train(worker, DEEP), train(worker, DEEP, 1)] == ["none", "none"]
    assert len(worker.notes) == 1
    assert train(worker, DEEP, 2) == "computed"


def test_maps_that_are_there_are_used_without_timing_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They paid for another trial."""
    assert train(start(tmp_path), VIEWS) == "computed"
    monkeypatch.setattr(prefix_payoff, "measure_cost", fail)
    assert train(start(tmp_path, "auto"), VIEWS) == "cached"


def test_more_maps_than_the_cache_holds_do_not_pay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be evicted before their next use, and others with them."""
    monkeypatch.setattr(prefix_payoff, "measure_cost", lambda *_, **__: SLOW)
    monkeypatch.setattr(open_banks, "_HOST_FRACTION", 0)
    monkeypatch.setenv("TUNER_CACHE_GB", "0.000001")
    assert train(start(tmp_path, "auto"), DEEP, n_sharing=9.0) == "none"


def test_trial_whose_maps_do_not_fit_its_device_trains_on_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are there to save time, and never the reason why a trial is not started."""
    admit = Admission.admit

    def refuse_maps(self: Admission, job: TrainingJob) -> TrainingJob:
        if job.cached is not None:
            raise DoesNotFit("too large")
        return admit(self, job)

    monkeypatch.setattr(Admission, "admit", refuse_maps)
    worker, plain = start(tmp_path), start(tmp_path, "never")
    assert [train(worker, VIEWS), train(plain, VIEWS)] == ["none", "none"]
    assert list_losses(worker) == list_losses(plain)


def test_maps_that_find_no_room_during_a_trial_are_computed_in_that_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial is the same, and the user is told what would help."""
    monkeypatch.setenv("TUNER_CACHE_GB", "0")
    fraction = "tuner.data.feature_store._MEMORY_FRACTION"

    def fill_up(_: EpochDone) -> Verdict:
        monkeypatch.setattr(fraction, 0)
        return Verdict()

    worker = start(tmp_path, desk=Desk(answer=fill_up))
    assert train(worker, VIEWS) == "computed"
    assert any("epoch 2 computes its frozen layers: its maps take" in note for note in worker.notes)
    plain = start(tmp_path, "never")
    train(plain, VIEWS)
    assert list_losses(worker) == pytest.approx(list_losses(plain), rel=1e-4)


def test_cache_that_is_cleared_during_a_trial_costs_time_alone(tmp_path: Path) -> None:
    """What is mapped stays; the next view is computed."""

    def clear(_: EpochDone) -> Verdict:
        clear_cache(["features"])
        return Verdict()

    worker, plain = start(tmp_path, desk=Desk(answer=clear)), start(tmp_path, "never")
    assert [train(worker, VIEWS), train(plain, VIEWS)] == ["computed", "none"]
    assert list_losses(worker) == pytest.approx(list_losses(plain), rel=1e-4)


def test_interrupted_trial_goes_on_to_the_same_bits_on_maps(tmp_path: Path) -> None:
    """Its checkpoint holds the suffix; its maps are found again."""
    whole = start(tmp_path)
    train(whole, VIEWS)
    file = str(tmp_path / "checkpoint")

    class Interruption(Exception):  # noqa: N818
        pass

    def interrupt(done: EpochDone) -> Verdict:
        if done.results[0][1].epoch == 3:
            raise Interruption
        return Verdict()

    first = start(tmp_path, desk=Desk(answer=interrupt), checkpoint_every="0.001s")
    with pytest.raises(AssertionError):
        train(first, VIEWS, checkpoint=file)
    second = start(tmp_path)
    assert train(second, VIEWS, 1, checkpoint=file) == "cached"
    assert "goes on after epoch 2 of trial 0" in second.notes[0]
    assert list_losses(second, 1) == list_losses(whole)


def test_prefix_that_changes_between_trials_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that a user's function reads may be replaced: no trial trains on another one's maps."""
    worker = start(tmp_path)
    assert [train(worker, DEEP), train(worker, DEEP, 1)] == ["computed", "cached"]
    monkeypatch.setattr(own_backbones, "SEED", 1)
    assert train(worker, DEEP, 2) == "none"
    assert worker.notes[0].endswith("its frozen layers are not the same in all trials")
    plain = start(tmp_path, "never")
    train(plain, DEEP, 2)
    assert list_losses(worker, 2) == pytest.approx(list_losses(plain, 2), rel=1e-4)


@pytest.mark.parametrize(("first", "second"), [("always", "auto"), ("never", "always")])
def test_interrupted_trial_goes_on_as_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    """On maps or on images, whatever would be decided now: its checkpoint serves its own kind alone."""
    monkeypatch.setattr(prefix_payoff, "measure_cost", lambda *_, **__: CHEAP)
    file = str(tmp_path / "checkpoint")
    began = start(tmp_path, first, checkpoint_every="0.001s")
    kind = train(began, VIEWS, checkpoint=file)
    ends = start(tmp_path, second)
    assert (train(ends, VIEWS, 1, checkpoint=file) != "none") is (kind != "none")
    assert "goes on after epoch 2 of trial 0" in ends.notes[0]
    assert list_losses(ends, 1) == list_losses(began)


def test_finished_trials_leave_no_model_behind(tmp_path: Path) -> None:
    """What is known of a cut is a graph of names; a device would soon be full of models."""
    worker = start(tmp_path)
    kept: list[weakref.ref[torch.nn.Module]] = []
    make_model = worker.bench.make_model

    def watch(params: TrialParams) -> torch.nn.Module:
        model = make_model(params)
        kept.append(weakref.ref(model))
        return model

    worker.bench.make_model = watch  # type: ignore[method-assign]
    train(worker, DEEP)
    gc.collect()
    assert len(kept) == 2  # the trial's and its twin
    assert all(each() is None for each in kept)


@pytest.mark.parametrize(("need", "limit"), [("100 MB", "1 GB"), ("600 MB", "1 GB"), ("100 MB", None)])
def test_steps_are_recorded_on_maps_where_memory_is_known_to_hold_them_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, need: str, limit: str | None
) -> None:
    """Not on images, whose steps are long; not where the record and a plain step might not fit together."""
    line = MemoryLine(fixed_bytes=parse_size(need), bytes_per_image=0)
    known = MemoryNeed(lines=(line,), gradient_bytes=0, scratch_bytes=0)
    monkeypatch.setattr(MemoryNeeds, "find", lambda *_: known)
    monkeypatch.setattr(step_graphs, "_LEAST_STEPS", 3)
    limits: dict[str, Any] = {} if limit is None else {"memory_limit": limit}
    worker = start(tmp_path, **limits)
    recorded: list[int] = []

    def record(model: torch.nn.Module, step: Step, inputs: torch.Tensor, labels: torch.Tensor) -> Step:
        recorded.append(inputs.ndim)
        return step

    worker.bench.graphs = StepGraphs(worker.notes.append, record)
    params = replace(DEEP, dropout=0.0)
    assert train(worker, params) == "computed"
    assert train(worker, replace(params, augmentation_strength=0.5), 1) == "none"
    assert recorded == ([2] if (need, limit) == ("100 MB", "1 GB") else [])  # packed maps, one row for each image
    assert worker.notes == []


def test_steps_are_recorded_on_a_cuda_device_alone(tmp_path: Path) -> None:
    """The same study file serves both kinds of machines."""
    assert start(tmp_path, cuda_graphs=True).bench.graphs is None
