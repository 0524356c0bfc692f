"""The fault harness: a short seeded run, and an audit that sees what it is there to see."""

import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.cases.faults import strike_until
from benchmarks.faults.audit import Audit, End, read_end, read_worker_log
from benchmarks.faults.forge import FORGERIES, audit_forged, make_sound
from benchmarks.faults.schedule import Action, RunFaults, draw_faults
from benchmarks.faults.stored import copied, read_stored
from benchmarks.faults.strike import Study, may_give_up
from benchmarks.faults.studies import REAL, TORCH_FREE, make_place
from benchmarks.faults.worker_log import Ticket


def strike(database: Path, statement: str, *values: object) -> None:
    """Change a database behind everyone's back."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(statement, values)


def make_audit(folder: Path) -> tuple[Audit, Path]:
    """Return the audit of a sound study of three trials, and its database."""
    database, logs, shown = make_sound(folder)
    audit = Audit(n_trials=3)
    audit.hear(logs, shown)
    audit.check(read_stored(database))
    return audit, database


def test_audit_finds_nothing_in_a_sound_database(tmp_path: Path) -> None:
    """No false alarm."""
    assert audit_forged(*make_audit(tmp_path), "SELECT 1") == set()


@pytest.mark.parametrize("name", FORGERIES)
def test_audit_sees_a_forged_database(tmp_path: Path, name: str) -> None:
    """A lost tell, a repeated one, another value: each is found, and called what it is."""
    assert name.partition(":")[0] in audit_forged(*make_audit(tmp_path), FORGERIES[name])


def test_audit_holds_an_acknowledged_end_to_be_stored(tmp_path: Path) -> None:
    """An end that was only sent may be lost; one after which the worker was given other trials may not."""
    database, (log,), _ = make_sound(tmp_path)
    strike(database, "UPDATE trials SET state = 'RUNNING', datetime_complete = NULL WHERE number = 2")
    sent, acknowledged = Audit(n_trials=3), Audit(n_trials=3)
    sent.hear([log], [])
    sent.check(read_stored(database))
    assert sent.findings == []
    log.write_text(log.read_text() + "\nreceived 3\n")
    acknowledged.hear([log], [])
    acknowledged.check(read_stored(database))
    assert [finding.kind for finding in acknowledged.findings] == ["lost"]


def test_audit_lets_a_torn_wal_take_back_ends_and_nothing_else(tmp_path: Path) -> None:
    """What is left of the file must still be what was told."""
    audit, database = make_audit(tmp_path)
    strike(database, "UPDATE trials SET state = 'RUNNING', datetime_complete = NULL WHERE number = 2")
    audit.accept_loss(read_stored(database))
    audit.check(read_stored(database))
    assert (audit.n_undone, audit.findings) == (1, [])
    strike(database, "UPDATE trial_values SET value = 0.1 WHERE trial_id = 1")
    audit.check(read_stored(database))
    assert {finding.kind for finding in audit.findings} == {"wrong value", "told twice"}


def test_audit_counts_retries_and_half_written_files(tmp_path: Path) -> None:
    """A point that faults ended is tried three times in all; nothing half written stays."""
    database, logs, shown = make_sound(tmp_path, [(0.5, 0.6)] * 5)
    for key in (1, 2, 3):
        strike(database, "UPDATE trials SET state = 'FAIL' WHERE trial_id = ?", key)
        strike(database, "INSERT INTO trial_user_attributes VALUES (?, 'reason', '\"worker_lost\"')", key)
        strike(database, "INSERT INTO trial_user_attributes VALUES (?, 'retry_of', ?)", key + 1, str(key - 1))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / ".trial-3.99.tmp").touch()
    audit = Audit(n_trials=2)
    audit.hear(logs, shown[3:])
    audit.check_end(read_stored(database))
    audit.check_files(tmp_path / "models")
    assert {finding.kind for finding in audit.findings} == {"retried too often", "half file", "told twice"}


def test_audit_lets_only_what_a_kill_interrupted_wait(tmp_path: Path) -> None:
    """Its retry is what the study would go on with; in the middle of a study the queue may hold anything."""
    database, logs, shown = make_sound(tmp_path, [(0.5, 0.6)] * 2)
    strike(database, "UPDATE trials SET state = 'WAITING', datetime_complete = NULL WHERE number = 1")
    strike(database, "INSERT INTO trial_user_attributes VALUES (2, 'retry_of', '0')")
    found = []
    for reason in ('"interrupted"', '"worker_lost"'):
        strike(database, "DELETE FROM trial_user_attributes WHERE key = 'reason'")
        strike(database, "INSERT INTO trial_user_attributes VALUES (1, 'reason', ?)", reason)
        for may_wait in (True, False):
            audit = Audit(n_trials=1)
            audit.hear(logs, shown[:1])
            audit.check_open(read_stored(database), may_wait=may_wait)
            found.append([finding.kind for finding in audit.findings])
    assert found == [[], [], [], ["zombie"]]


def test_audit_finds_checkpoints_and_models_that_should_be_gone(tmp_path: Path) -> None:
    """Of a finished study the best trial's model stays, and what its waiting trials would go on from."""
    audit, database = make_audit(tmp_path)
    models, checkpoints = tmp_path / "models", tmp_path / "checkpoints"
    (models / "struck" / "trial-2").mkdir(parents=True)
    (checkpoints / "struck").mkdir(parents=True)
    audit.check_kept(read_stored(database), models, checkpoints)
    assert audit.findings == []
    (models / "struck" / "trial-1").mkdir()
    (checkpoints / "struck" / "trial-0.pt").touch()
    audit.check_kept(read_stored(database), models, checkpoints)
    assert [finding.text for finding in audit.findings] == [
        "the checkpoint trial-0.pt is left",
        "of the models only trial 2's must be kept, got ['trial-1', 'trial-2']",
    ]
    strike(database, "INSERT INTO trials (number, study_id, state) VALUES (3, 1, 'WAITING')")
    strike(database, "INSERT INTO trial_user_attributes VALUES (4, 'first_attempt', '0')")
    (models / "struck" / "trial-1").rmdir()
    waiting, _ = make_audit(make_folder(tmp_path / "again"))
    waiting.check_kept(read_stored(database), models, checkpoints)
    assert waiting.findings == []


def test_audit_misses_the_best_trials_model(tmp_path: Path) -> None:
    """Unless a torn WAL made an older trial the best again, whose model was removed when it was not."""
    audit, database = make_audit(tmp_path)
    audit.check_kept(read_stored(database), tmp_path / "models", tmp_path / "checkpoints")
    assert [finding.kind for finding in audit.findings] == ["left file"]
    torn, _ = make_audit(make_folder(tmp_path / "torn"))
    torn.accept_loss(read_stored(database))
    torn.check_kept(read_stored(database), tmp_path / "models", tmp_path / "checkpoints")
    assert torn.findings == []


def make_folder(folder: Path) -> Path:
    """Make a folder and return it."""
    folder.mkdir()
    return folder


def test_audit_reads_a_copy_and_leaves_the_wal_of_a_killed_process(tmp_path: Path) -> None:
    """The next run is to find it as the kill left it."""
    database, *_ = make_sound(tmp_path)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("UPDATE trials SET state = 'FAIL' WHERE number = 0")
        connection.commit()
        left = tmp_path / "left.db"
        for suffix in ("", "-wal"):
            shutil.copy(f"{database}{suffix}", f"{left}{suffix}")
    size = Path(f"{left}-wal").stat().st_size
    with copied(left) as copy:
        assert read_stored(copy).trials[0].state == "FAIL"
    assert Path(f"{left}-wal").stat().st_size == size > 0


def test_worker_log_of_a_killed_worker_is_read_to_its_last_line(tmp_path: Path) -> None:
    """What a worker said last is the end that it may not have sent."""
    log = tmp_path / "0000-worker-7.log"
    log.write_text("received 4\ntrial 4 epoch 1 value 0.25\ntrial 4 ended COMPLETE 0.25\nstrike worker before\n")
    training = read_worker_log(log)[4]
    assert (training.epochs, training.end) == ({1: 0.25}, End(state="COMPLETE", value=0.25))
    assert not training.is_acknowledged
    assert read_end("trial 4 ended PRUNED -") == (4, End(state="PRUNED", value=None))


def test_study_notices_pixels_that_were_used_though_damaged(tmp_path: Path) -> None:
    """A cache file that is still as the harness broke it, after workers have trained, was not looked at."""
    source = random.Random(4)  # noqa: S311 - no secret
    study = Study(make_place(tmp_path / "study", TORCH_FREE, source, n_trials=1), source, n_trials=1)
    pixels = tmp_path / "study" / "cache" / "pixels" / "digits.npy"
    pixels.parent.mkdir(parents=True)
    log = tmp_path / "0001-worker-7.log"
    log.write_text("received 0\n")
    found = []
    for is_made_anew in (True, False):
        pixels.write_bytes(b"pixels" * 99)
        study.damage("damaged cache")
        assert pixels.read_bytes() != b"pixels" * 99
        if is_made_anew:
            pixels.write_bytes(b"pixels" * 99)
        study.check_damaged([log])
        found.append(study.outcome.kinds["used damaged cache"])
    assert found == [0, 1]


LOST = "error: workers: must be able to start and prepare the study, but worker 3 was killed by signal 9"
IN_A_ROW = "error: study 'struck': 5 trials failed in a row; the last one: worker 3 was killed"


@pytest.mark.parametrize(
    ("lines", "struck", "may"),
    [
        ([LOST], {"kill worker": 2, "kill worker after a message": 1}, True),
        ([LOST], {"kill worker": 2, "lock": 4}, False),
        (["note: worker 2 said nothing for 5 s", LOST], {}, True),
        ([*[f"trial {number} ended FAIL -" for number in range(5)], IN_A_ROW], {"kill worker": 1}, True),
        ([*[f"trial {number} ended FAIL -" for number in range(4)], IN_A_ROW], {"kill worker": 9}, False),
        (["error: study 'struck': at least one trial must complete"], {"kill worker": 9}, False),
        (["trial 4 ended FAIL -"], {"kill worker": 9}, False),
    ],
)
def test_run_may_give_up_only_for_a_reason_that_it_had(lines: list[str], struck: dict[str, int], *, may: bool) -> None:
    """A run that dies of one worker's death is a finding."""
    assert may_give_up(lines, struck) is may


def test_real_round_that_never_resumed_is_a_finding() -> None:
    """Kills that meet no checkpoint show nothing of checkpoints; a round of no kills is the shortest of these."""
    assert strike_until(REAL, seed=0, n_kills=0, n_trials=1, n_study_kills=1).kinds == {"never resumed": 1}
    assert strike_until(TORCH_FREE, seed=0, n_kills=0, n_trials=1, n_study_kills=1).kinds == {}


def test_schedule_is_its_seed() -> None:
    """A finding can be struck again."""
    first, again, other = (draw_faults(random.Random(seed)) for seed in (1, 1, 2))  # noqa: S311 - no secret
    assert first == again != other


def test_study_struck_by_a_seeded_schedule_loses_nothing(tmp_path: Path) -> None:
    """A worker is killed before a message, another one after, then both with the coordinator; the WAL gets garbage."""
    n_trials = 30
    source = random.Random(3)  # noqa: S311 - no secret
    study = Study(make_place(tmp_path / "study", TORCH_FREE, source, n_trials=n_trials), source, n_trials=n_trials)
    tickets = (
        Ticket(at=9, moment="before", victim="worker"),
        Ticket(at=12, moment="after", victim="worker"),
        Ticket(at=12, moment="after", victim="both"),
    )
    last = Action(kind="kill both", phase="trials", delay=2.0)
    assert not study.run(RunFaults(tickets=tickets, actions=(last,), damage="WAL with garbage behind it"))
    assert study.run(RunFaults(tickets=(), actions=(), damage="none"))
    running = "INSERT INTO trials (number, study_id, state) SELECT max(number) + 1, 1, 'RUNNING' FROM trials"
    strike(tmp_path / "study" / "studies.db", running)  # as a kill after the last trial that counts may leave it
    study.run_with_fewer_trials()
    outcome = study.conclude()
    assert outcome.findings == []
    assert outcome.n_kills >= 2
    assert outcome.n_tidied == 1
    assert outcome.struck["WAL with garbage behind it"] == 1
    assert set(outcome.seen) == set(FORGERIES)
