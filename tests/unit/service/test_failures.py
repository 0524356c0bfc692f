"""What a run does about trials and workers that fail."""

from pathlib import Path

import pytest

from tuner.errors import SearchError
from tuner.service.failures import FailureCount, Loss, MemoryKills
from tuner.trial import Reason, TrialOutcome, TrialState

COMPLETE = TrialOutcome(state=TrialState.COMPLETE)


def fail(reason: Reason = Reason.ERROR) -> TrialOutcome:
    """Return the outcome of a trial that failed."""
    return TrialOutcome(state=TrialState.FAIL, reason=reason, message="boom")


def count_all(count: FailureCount, *outcomes: tuple[int, TrialOutcome]) -> None:
    """Count trials that end one after the other, by the number of their first attempt."""
    for origin, outcome in outcomes:
        count.count(origin, outcome)
        count.check()


def test_check_ends_a_run_in_which_five_points_fail_in_a_row() -> None:
    """The line names the last one's error."""
    count = FailureCount("pets")
    count_all(count, *((origin, fail()) for origin in range(4)))
    with pytest.raises(SearchError, match="study 'pets': 5 trials failed in a row; the last one: boom"):
        count_all(count, (4, fail()))


@pytest.mark.parametrize("sixth", [fail(), COMPLETE], ids=["failed", "completed"])
def test_check_counts_to_the_fifth_whatever_ends_in_the_same_turn(sixth: TrialOutcome) -> None:
    """Two workers may answer at once: the run ends by the fifth failure all the same, and says so."""
    count = FailureCount("pets")
    for origin in range(5):
        count.count(origin, fail())
    count.count(5, sixth)
    with pytest.raises(SearchError, match="study 'pets': 5 trials failed in a row; the last one: boom"):
        count.check()


def test_check_lets_points_be_tried_again() -> None:
    """Two points that kill their worker at every attempt are two, not six."""
    count = FailureCount("pets")
    count_all(count, *((origin, fail(Reason.WORKER_LOST)) for origin in (0, 1) for _ in range(3)))
    count_all(count, *((origin, fail(Reason.COHORT_LOST)) for origin in range(2, 9)))


def test_check_counts_from_the_last_trial_that_ended_well() -> None:
    """A pruned one is such as well: it trained."""
    count = FailureCount("pets")
    pruned = TrialOutcome(state=TrialState.PRUNED, reason=Reason.PRUNER)
    for end in (COMPLETE, pruned):
        count_all(count, *((origin, fail()) for origin in range(4)), (9, end))


def test_trials_of_the_screen_show_that_workers_live_and_nothing_else() -> None:
    """However many of them fail, the search goes on; those that end well clear workers, not the points that failed."""
    count = FailureCount("pets")
    for origin in range(9):
        count.count(origin, fail(), is_screen=True)
    count_all(count, *((origin, fail()) for origin in range(10, 14)))
    count.count_idle_loss("a", "first")
    count.count_idle_loss("b", "second")
    count.count(9, COMPLETE, is_screen=True)
    count.count_idle_loss("c", "third")
    with pytest.raises(SearchError, match="5 trials failed in a row"):
        count_all(count, (14, fail()))


def test_count_idle_loss_ends_a_run_whose_workers_cannot_live() -> None:
    """Three in a row; hours apart, with good trials in between, they are accidents."""
    count = FailureCount("pets")
    for _ in range(4):
        count.count_idle_loss(object(), "worker 1 ended: killed by signal 9")
        count.count(0, COMPLETE)
    count.count_idle_loss("a", "first")
    for _ in range(8):  # workers that end together, with the process that had forked them
        count.count_idle_loss("b", "second")
    with pytest.raises(SearchError, match="workers: must be able to start and prepare the study, but third"):
        count.count_idle_loss("c", "third")


def write_counter(path: Path, value: int) -> Path:
    """Write what the kernel counts."""
    path.write_text(f"nr_free_pages 1\noom_kill_disable 5\noom_kill {value}\n")
    return path


def test_memory_kills_are_those_of_the_last_seconds(tmp_path: Path) -> None:
    """What the kernel did to others hours ago ended no worker now; a kernel that counts nothing never says so."""
    counters, now = write_counter(tmp_path / "vmstat", 7), [0.0]
    kills = MemoryKills(counters, lambda: now[0])
    assert not kills.were_just_now()
    write_counter(counters, 8)
    assert kills.were_just_now()
    now[0] = 6.0
    kills.watch()
    kills.watch()
    assert kills.were_just_now()
    now[0] = 12.0
    kills.watch()
    assert not kills.were_just_now()
    assert not MemoryKills(tmp_path / "missing").were_just_now()


@pytest.mark.parametrize(
    ("loss", "reason", "state"),
    [
        (Loss(message="m", n_given=1), Reason.WORKER_LOST, TrialState.FAIL),
        (Loss(message="m", n_given=1, was_killed=True), Reason.OUT_OF_MEMORY, TrialState.PRUNED),
        (Loss(message="m", n_given=9, was_killed=True), Reason.COHORT_LOST, TrialState.FAIL),
        (Loss(message="m", n_given=1, is_stalled=True), Reason.STALLED, TrialState.FAIL),
        (Loss(message="m", n_given=1, is_orphan=True), Reason.INTERRUPTED, TrialState.FAIL),
        (Loss(message="m", n_given=1, is_overdue=True), Reason.TIME_LIMIT, TrialState.PRUNED),
        (Loss(message="m", n_given=9, is_overdue=True), Reason.COHORT_LOST, TrialState.FAIL),
    ],
)
def test_blame_says_what_ended_the_worker(tmp_path: Path, loss: Loss, reason: Reason, state: TrialState) -> None:
    """Memory and time are the point's fault, if it was alone; of a cohort no one can be named."""
    counters = write_counter(tmp_path / "vmstat", 7)
    count = FailureCount("pets", MemoryKills(counters))
    write_counter(counters, 8)
    outcome = count.blame(loss)
    assert (outcome.reason, outcome.state) == (reason, state)
    assert outcome.message.startswith("m")
    assert ("memory" in outcome.message) == (loss.was_killed)


def test_blame_does_not_call_every_kill_a_lack_of_memory(tmp_path: Path) -> None:
    """Somebody may kill a worker by hand."""
    count = FailureCount("pets", MemoryKills(write_counter(tmp_path / "vmstat", 7)))
    assert count.blame(Loss(message="m", n_given=1, was_killed=True)).reason is Reason.WORKER_LOST
