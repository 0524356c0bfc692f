"""The trials of a study in any order of ask, report, prune, fail, lose, flush, kill and resume, against a model."""

import shutil
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.properties import reduced
from tests.unit.search.builders import (
    COMPLETE,
    PRUNED,
    close_storages,
    keep,
    make_epoch,
    make_facts,
    make_spec,
    make_url,
    open_small,
)
from tuner.search.storage import open_storage
from tuner.search.studies import open_study
from tuner.search.trial_book import TrialBook
from tuner.trial import Reason, TrialOutcome, TrialState

N_TRIALS = 12
EPOCHS = 3
MAX_LOSSES = 3
"""A point may be lost with its worker so often: the first time, and twice at most when it is tried again."""
ENDS = {
    "error": TrialOutcome(state=TrialState.FAIL, reason=Reason.ERROR, message="ValueError: x"),
    "lost": TrialOutcome(state=TrialState.FAIL, reason=Reason.WORKER_LOST, message="killed by signal 9"),
    "cohort lost": TrialOutcome(state=TrialState.FAIL, reason=Reason.COHORT_LOST, message="its cohort broke"),
    "stalled": TrialOutcome(state=TrialState.FAIL, reason=Reason.STALLED, message="said nothing"),
    "unreadable": TrialOutcome(state=TrialState.FAIL, reason=Reason.UNREADABLE, message="OSError: gone"),
    "late": TrialOutcome(state=TrialState.PRUNED, reason=Reason.TIME_LIMIT, message="took too long"),
    "interrupted": TrialOutcome(state=TrialState.FAIL, reason=Reason.INTERRUPTED, message="the run was stopped"),
    "memory": TrialOutcome(state=TrialState.PRUNED, reason=Reason.OUT_OF_MEMORY, message="CUDA out of memory"),
    "diverged": TrialOutcome(state=TrialState.PRUNED, reason=Reason.DIVERGED, message="NaN"),
}
LOSSES = {reason.value for reason in Reason if reason.may_pass}


SPEC = make_spec(search={"n_trials": N_TRIALS, "pruner": "asha", "sampler": "random"}, training={"epochs": EPOCHS})
"""Its pruner prunes from the second trial on."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A trial as the file has it."""

    state: str
    value: float | None
    curve: tuple[float, ...]
    attrs: dict[str, str] = field(hash=False)
    """JSON texts."""


def read_rows(folder: Path) -> dict[int, Row]:
    """Return the trials in the file by number, read by SQL alone."""
    with closing(sqlite3.connect(folder / "studies.db")) as connection:
        rows = {}
        for trial_id, number, state in connection.execute("SELECT trial_id, number, state FROM trials"):
            values = connection.execute("SELECT value FROM trial_values WHERE trial_id = ?", (trial_id,)).fetchall()
            curve = connection.execute(
                "SELECT intermediate_value FROM trial_intermediate_values WHERE trial_id = ? ORDER BY step", (trial_id,)
            )
            attrs = connection.execute(
                "SELECT key, value_json FROM trial_user_attributes WHERE trial_id = ?", (trial_id,)
            )
            assert number not in rows
            value = values[0][0] if values else None
            rows[number] = Row(state=state, value=value, curve=tuple(each for (each,) in curve), attrs=dict(attrs))
        assert sorted(rows) == list(range(len(rows)))
        return rows


class TrialBookStates(RuleBasedStateMachine):
    """A run that asks, reports and tells as it likes, and is killed now and then."""

    template: Path
    """A folder with a database without trials."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="states_"))
        self.curves: dict[int, list[float]] = {}
        """Of the running trials."""
        self.told: dict[int, str] = {}
        """States of the trials that ended, those that were ended since the last flush included."""
        self.kept: dict[int, str] = {}
        """What the last flush put into the file."""
        self.ended_rows: dict[int, Row] = {}
        """Finished trials as they were in the file for the first time."""

    @initialize()
    def start(self) -> None:
        """Open the empty study as a first run does."""
        shutil.copy(self.template / "studies.db", self.folder)
        self.storage = keep(open_storage(make_url(self.folder)))
        self.open()

    def open(self) -> None:
        """Open the study in the file and adopt what is left in it."""
        running = [row for row in self.read_file().values() if row.state == "RUNNING"]
        self.book = TrialBook(open_study(self.storage, SPEC, make_facts()))
        assert self.book.prepare() == len(running)
        rows = self.read_file()
        assert not [number for number, row in rows.items() if row.state == "RUNNING"]
        self.told = {number: row.state for number, row in rows.items() if row.state != "WAITING"}
        self.kept = dict(self.told)

    def read_file(self) -> dict[int, Row]:
        """Read the file; finished trials must be in it as they always were, and retries must have an end."""
        rows = read_rows(self.folder)
        for number, row in self.ended_rows.items():
            assert rows[number] == row
        for number, row in rows.items():
            if row.state not in {"RUNNING", "WAITING"}:
                self.ended_rows[number] = row
            assert count_losses(rows, number) <= MAX_LOSSES
        retried = [row.attrs["retry_of"] for row in rows.values() if "retry_of" in row.attrs]
        assert len(retried) == len(set(retried))
        return rows

    @precondition(lambda self: self.wants_more())
    @rule(n_asked=st.integers(1, 3))
    def ask_some(self, n_asked: int) -> None:
        """Start trials, as a run does that has not enough of them."""
        for _ in range(n_asked):
            if self.wants_more():
                self.ask()

    @precondition(lambda self: self.wants_more())
    @rule(n_lost=st.integers(1, 5))
    def lose_in_a_row(self, n_lost: int) -> None:
        """Lose one trial after the other, as a point does that kills its workers."""
        for _ in range(n_lost):
            self.end(self.ask(), ENDS["lost"])

    def wants_more(self) -> bool:
        """Whether the study has not its trials yet."""
        return self.book.count_finished() + self.book.count_running() < N_TRIALS

    def ask(self) -> int:
        """Start a trial."""
        asked = self.book.ask()
        assert asked is not None
        number, params = asked
        assert number not in self.told
        assert number not in self.curves
        assert params.epochs == EPOCHS
        self.curves[number] = []
        return number

    @precondition(lambda self: self.curves)
    @rule(data=st.data(), values=st.lists(st.floats(0, 1, width=16), min_size=1, max_size=EPOCHS))
    def train(self, data: st.DataObject, values: list[float]) -> None:
        """Report some epochs of a trial."""
        number = data.draw(st.sampled_from(sorted(self.curves)))
        for value in values:
            if number in self.curves:
                self.report(number, value)

    def report(self, number: int, value: float) -> None:
        """Report an epoch; a trial that has had its last one completes, one that is to be pruned is."""
        curve = self.curves[number]
        curve.append(value)
        prunes = self.book.report(number, make_epoch(len(curve), value))
        assert not (prunes and len(curve) == EPOCHS)
        if prunes:
            self.end(number, PRUNED)
        elif len(curve) == EPOCHS:
            assert self.end(number, COMPLETE) == value

    @precondition(lambda self: self.curves)
    @rule(data=st.data(), how=st.sampled_from(sorted(ENDS)))
    def end_early(self, data: st.DataObject, how: str) -> None:
        """Lose a trial, or have it fail."""
        assert self.end(data.draw(st.sampled_from(sorted(self.curves))), ENDS[how]) is None

    def end(self, number: int, outcome: TrialOutcome) -> float | None:
        """Tell a trial."""
        value = self.book.tell(number, outcome)
        del self.curves[number]
        assert number not in self.told
        self.told[number] = outcome.state.value
        return value

    @rule()
    def flush(self) -> None:
        """Store what happened; all that was told is in the file then."""
        self.book.flush()
        self.kept = dict(self.told)
        rows = self.read_file()
        assert {
            number: row.state for number, row in rows.items() if row.state not in {"RUNNING", "WAITING"}
        } == self.told
        assert {number for number, row in rows.items() if row.state == "RUNNING"} == set(self.curves)
        for number, curve in self.curves.items():
            assert rows[number].curve == tuple(curve)

    @rule()
    def kill(self) -> None:
        """End the process without a flush, and start the next one: nothing of what was stored is lost."""
        kept = self.kept
        self.storage.remove_session()
        self.storage.engine.dispose()  # SQLite sees no more of a process that ends than its connections
        self.curves = {}
        self.open()
        assert self.kept.items() >= kept.items()
        assert set(self.kept.values()) <= {"COMPLETE", "PRUNED", "FAIL"}

    @invariant()
    def count_is_exact(self) -> None:
        """COMPLETE and PRUNED trials count, and no others; there are never too many."""
        if hasattr(self, "book"):
            n_finished = sum(state in {"COMPLETE", "PRUNED"} for state in self.told.values())
            assert self.book.count_finished() == n_finished <= N_TRIALS
            assert set(self.book.running_numbers) == set(self.curves)

    def teardown(self) -> None:
        """Close the last storage."""
        close_storages()
        shutil.rmtree(self.folder)


def count_losses(rows: dict[int, Row], number: int) -> int:
    """Return how often a trial's point was lost with its worker, in this trial and in those that it retries."""
    n_losses = 0
    while True:
        attrs = rows[number].attrs
        n_losses += attrs.get("reason", "").strip('"') in LOSSES
        if "retry_of" not in attrs:
            return n_losses
        number = int(attrs["retry_of"])


def test_trial_book_keeps_its_promises_in_any_order(tmp_path: Path) -> None:
    """The count is exact, nothing is told twice, nothing that was stored is lost, and nothing is left running."""
    open_small(tmp_path, SPEC)
    close_storages()

    class FromTemplate(TrialBookStates):
        template = tmp_path

    # A quarter of the usual examples, since each opens the database often.
    run_state_machine_as_test(FromTemplate, settings=settings(max_examples=reduced(4), stateful_step_count=50))
