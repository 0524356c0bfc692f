"""What is stored reaches the terminal as text: no escape moves its cursor, and no line is forged."""

import contextlib
import csv
import io
import json
import sqlite3
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState, create_trial

from tests.unit.search.builders import close_storages, make_url, open_small, read_plainly, run_trial
from tests.unit.service.test_wire import PARAMS
from tuner.cli.main import run_command
from tuner.errors import StudyError
from tuner.production.reading import describe_trial, read_trial
from tuner.search.trial_attrs import PARAMS_ATTR, REASON_ATTR
from tuner.search.trial_book import TrialBook

ESCAPE = "\x1b[2J\x9b1A\r\u202e"
NAME = f"a{ESCAPE}\nerror: forged"
SHOWN = "a?[2J?1A???error: forged"
STORED: dict[str, Any] = {
    PARAMS_ATTR: asdict(PARAMS) | {"backbone": NAME},
    REASON_ATTR: NAME,
    "message": NAME,
    "device": NAME,
    "traceback": f'Traceback{ESCAPE}:\n  File "x.py"',
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A study with one failed and one completed trial, all of whose words are hostile."""
    folder: Path = tmp_path_factory.mktemp("hostile")
    open_small(folder)
    study = read_plainly(folder)
    distributions: dict[str, BaseDistribution] = {"backbone": CategoricalDistribution([NAME])}
    for state, value in ((TrialState.FAIL, None), (TrialState.COMPLETE, 0.5)):
        study.add_trial(
            create_trial(
                state=state, value=value, params={"backbone": NAME}, distributions=distributions, user_attrs=STORED
            )
        )
    close_storages()
    return make_url(folder)


def read(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must succeed; return what it printed, which must be printable."""
    assert run_command(list(arguments)) == 0
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.split("\n"))
    return shown


def test_show_prints_words_and_keeps_the_lines_of_a_traceback(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Message, device and params are parts of a line; a traceback is lines."""
    lines = read(capsys, "show", "small", "0", "--storage", url).splitlines()
    assert lines[0] == f"trial 0 of small: fail ({SHOWN}: {SHOWN})"
    assert f"  backbone = {SHOWN}" in lines
    assert any(line.endswith(f"started on {SHOWN}") for line in lines)
    assert lines[-2:] == ["Traceback?[2J?1A??:", '  File "x.py"']


def test_trials_are_printable_as_a_table_and_as_csv(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """CSV is looked at in a terminal before it is written to a file."""
    assert SHOWN in read(capsys, "trials", "small", "--storage", url)
    first, second = csv.DictReader(io.StringIO(read(capsys, "trials", "small", "--csv", "--storage", url)))
    assert (first["reason"], first["backbone"], first["value"], first["lr"]) == (SHOWN, SHOWN, "", "")
    assert (second["state"], second["value"]) == ("complete", "0.5")


def test_status_is_printable(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Reasons and the best recipe come from the database."""
    lines = read(capsys, "status", "small", "--storage", url).splitlines()
    assert f"1 failed (1 {SHOWN})" in lines[0]
    assert f"  backbone = {SHOWN}" in lines


def test_json_keeps_what_is_stored(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON escapes by itself; other programs read the words as they are."""
    assert json.loads(read(capsys, "show", "small", "0", "--json", "--storage", url))["message"] == NAME
    assert json.loads(read(capsys, "status", "small", "--json", "--storage", url))["best"]["recipe"]["backbone"] == NAME


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", ["x"]), ("seconds", "long"), ("message", 3), ("traceback", 3), ("recipe", "x")]
)
def test_describe_trial_says_that_a_trial_is_damaged(url: str, name: str, value: Any) -> None:
    """One line, which repeats nothing of it."""
    trial = read_trial("small", 0, url) | {"seconds": 1.0, name: value}
    with pytest.raises(StudyError, match=r"^trial 0 of 'small': must be as 'tuner run' stored it, got .*$"):
        describe_trial(trial)


def test_list_goes_on_after_a_damaged_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are listed; the damaged one by its name."""
    open_small(tmp_path)
    read_plainly(tmp_path).set_user_attr("tuner:spec", "{")
    close_storages()
    assert read(capsys, "list", "--storage", make_url(tmp_path)).splitlines()[1].split() == ["small", "0/?", "?", "-"]
    for command in ("status", "trials", "best"):
        assert run_command([command, "small", "--storage", make_url(tmp_path)]) == 4
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE trial_user_attributes SET value_json = '{'",
        "UPDATE trials SET state = 'FINISHED'",
        "UPDATE trials SET datetime_complete = 'yesterday'",
    ],
)
def test_damaged_trials_are_one_line_and_hide_no_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """Rows that no program of ours wrote end no command in a traceback."""
    book = TrialBook(open_small(tmp_path))
    run_trial(book)
    book.flush()
    close_storages()
    with contextlib.closing(sqlite3.connect(tmp_path / "studies.db", isolation_level=None)) as connection:
        connection.execute(damage)
    assert read(capsys, "list", "--storage", make_url(tmp_path)).splitlines()[1].split()[0] == "small"
    for command in (["status", "small"], ["trials", "small"], ["best", "small"], ["show", "small", "0"]):
        assert run_command([*command, "--storage", make_url(tmp_path)]) == 4
        (line,) = capsys.readouterr().err.splitlines()
        assert "must be as 'tuner run' stored it" in line
