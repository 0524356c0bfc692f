"""When a run ends, and what it has held."""

import math
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.unit.search.builders import make_facts, make_spec, make_storage
from tuner.search.ledger import RUNS_ATTR, RunCost, read_ledger, read_runs
from tuner.search.studies import StoredStudy, open_study
from tuner.service.run_clock import RunClock, is_budget_spent
from tuner.service.sharing import Sharing
from tuner.service.slots import Slot

CPU = (Slot(device="cpu", n_threads=1),) * 4
SHARED = tuple(Slot(device=f"cuda:{number % 2}", n_threads=1) for number in range(4))


def open_with(folder: Path, **search: object) -> StoredStudy:
    """Open a study whose [search] has some keys."""
    return open_study(make_storage(folder), make_spec(search=search), make_facts())


def test_run_without_a_budget_has_no_end(tmp_path: Path) -> None:
    """Whatever is kept back for the confirmation."""
    clock = RunClock(open_with(tmp_path, confirm_fraction=0.5), CPU, started=time.monotonic())
    assert clock.search_deadline().soft == clock.whole_deadline().hard == math.inf
    assert clock.describe_budget() == ""


@pytest.mark.parametrize(("slots", "n_devices"), [(CPU, 4), (SHARED, 2)])
def test_device_time_is_shared_by_the_devices(tmp_path: Path, slots: tuple[Slot, ...], n_devices: int) -> None:
    """Workers that share a GPU hold one; a share is kept back; what is spent is stored and counts in the next run."""
    stored = open_with(tmp_path, budget="1 gpu-hour", confirm_fraction=0.25)
    started = time.monotonic() - 60
    clock = RunClock(stored, slots, started=started)
    assert clock.whole_deadline().hard == pytest.approx(started + 3600 / n_devices)
    assert clock.search_deadline().hard == pytest.approx(started + 0.75 * 3600 / n_devices)
    assert clock.weigh(slots[0], 10.0) == 10.0 * n_devices / len(slots)
    clock.add_build(slots[0], 5.0)
    clock.save()
    ledger = read_ledger(stored.study)
    assert ledger.held == pytest.approx(60 * n_devices, rel=0.05)
    assert ledger.build == pytest.approx(5.0 * n_devices / len(slots))
    assert not is_budget_spent(stored)
    later = time.monotonic()
    again = RunClock(stored, slots, started=later)
    assert again.whole_deadline().hard == pytest.approx(later + (3600 - ledger.held) / n_devices, abs=1)


def test_probe_changes_what_a_workers_time_is_worth(tmp_path: Path) -> None:
    """From then on two share a device; what was measured is kept with the run, and its time is that of one device."""
    stored = open_with(tmp_path)
    clock = RunClock(stored, (SHARED[0],) * 4, started=time.monotonic())
    sharing = Sharing(device="cuda:0", n_workers=2, speeds=(100.0, 150.0, 152.0), reason="")
    clock.settle(sharing, (SHARED[0],) * 2, 12.0)
    assert clock.weigh(SHARED[0], 10.0) == 5.0
    clock.save()
    run = read_runs(stored.study.user_attrs)[-1]
    assert (run.per_device, list(run.probed_speeds), run.build_seconds) == (2, [100.0, 150.0, 152.0], 12.0)


def test_wall_time_is_not_shared(tmp_path: Path) -> None:
    """Four cores do not make an hour shorter; a spent budget is noticed before anything starts."""
    stored = open_with(tmp_path, budget="1h")
    started = time.monotonic() - 3601
    clock = RunClock(stored, CPU, started=started)
    assert clock.whole_deadline().is_over
    clock.save()
    assert is_budget_spent(stored)


def test_share_kept_back_is_not_divided_again(tmp_path: Path) -> None:
    """A run that goes on near the budget's end leaves the confirmation what the first one promised."""
    stored = open_with(tmp_path, budget="10h", confirm_fraction=0.2)
    earlier = RunCost(started="", wall_seconds=8.5 * 3600, n_devices=4, build_seconds=0.0)
    stored.study.set_user_attr(RUNS_ATTR, [asdict(earlier)])
    clock = RunClock(stored, CPU, started=time.monotonic())
    assert clock.search_deadline().is_over
    assert clock.whole_deadline().hard == pytest.approx(time.monotonic() + 1.5 * 3600, abs=5)


def test_timeout_is_soft_and_a_budget_is_hard(tmp_path: Path) -> None:
    """After a timeout running trials finish; after a budget they stop at their next epoch."""
    started = time.monotonic()
    clock = RunClock(open_with(tmp_path, timeout="1m"), CPU, started=started)
    assert clock.search_deadline().soft == started + 60
    assert clock.search_deadline().hard == math.inf


def test_run_is_saved_now_and_then(tmp_path: Path) -> None:
    """Not at every turn of the loop, and always when it ends; a run is one entry."""
    stored = open_with(tmp_path)
    clock = RunClock(stored, CPU, started=time.monotonic() - 5)
    clock.save(is_due=False)
    first = read_ledger(stored.study).held
    time.sleep(0.05)
    clock.save(is_due=False)
    assert read_ledger(stored.study).held == first
    clock.save()
    assert first < read_ledger(stored.study).held < first + 4
