"""What ``tuner cache`` lists and clears, as a user types it."""

import io
import json
import re
from pathlib import Path

import click
import pytest

from tests.e2e.mistakes import fail, write_study
from tuner.cli.cache import cache
from tuner.cli.main import run_command
from tuner.data.cache import KINDS
from tuner.data.feature_store import open_bank
from tuner.data.sources import read_index
from tuner.data.store import open_store
from tuner.spec.study import load_spec


@pytest.fixture
def filled(folder: Path) -> Path:
    """A folder whose cache holds the pixels of twelve images and one bank of features."""
    section = load_spec(Path(write_study(folder))).data
    open_store(read_index(section), range(12), section, interpolation="bilinear")
    open_bank({"key": 1}, shape=(1000, 50), fill=lambda features: features.fill(1), text="net: 1000 images")
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run ``tuner cache``, which must succeed; return what it printed."""
    assert run_command(["cache", *arguments]) == 0
    return capsys.readouterr().out


def test_cache_lists_what_it_holds(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table for a person, and the total against the budget."""
    header, pixels, features, total = call(capsys).splitlines()
    assert header.split() == ["KIND", "SIZE", "LAST", "USED", "HOLDS"]
    date = r"\d{4}-\d\d-\d\d \d\d:\d\d UTC"
    assert re.fullmatch(rf"pixels +9\.\d kB +{date}  12 images of .*images, 16 px, squash, bilinear", pixels), pixels
    assert re.fullmatch(rf"features +200\.\d kB +{date}  net: 1000 images", features), features
    assert re.fullmatch(rf"2\d\d\.\d kB in {filled}/cache; pixels and features may take 50\.0 GB", total), total


def test_cache_prints_json(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same for a program."""
    found = json.loads(call(capsys, "--json"))
    assert [entry["kind"] for entry in found["entries"]] == ["pixels", "features"]
    assert found["n_bytes"] == sum(entry["n_bytes"] for entry in found["entries"])
    assert found["budget_bytes"] == 50_000_000_000
    assert all(Path(entry["path"]).is_file() for entry in found["entries"])
    assert all(entry["last_used"].endswith("+00:00") for entry in found["entries"])


def test_cache_clears_the_kinds_asked_for(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other kinds stay, and what was freed is said."""
    assert "images, 16 px" not in call(capsys, "--kind", "features")
    assert re.fullmatch(r"freed 200\.\d kB\n", call(capsys, "--clear", "--yes", "--kind", "features"))
    assert "pixels" in call(capsys)
    assert json.loads(call(capsys, "--clear", "--yes", "--json"))["freed_bytes"] > 9000
    assert call(capsys) == f"nothing: 0 bytes in {filled}/cache; pixels and features may take 50.0 GB\n"


def test_cache_asks_before_it_clears(
    filled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A no, or nobody there to answer, changes nothing."""
    for answer in ("n\n", ""):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        assert fail(capsys, "cache", "--clear") == (2, "nothing was changed\n")
    assert len(call(capsys).splitlines()) == 4
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    said = call(capsys, "--clear")
    assert re.match(rf"Clear 2 entries, 2\d\d\.\d kB, from {filled}/cache\? \[y/N\]: freed 2\d\d\.\d kB\n", said), said


@pytest.mark.parametrize("arguments", [["--yes"], ["--kind", "models"]])
def test_cache_refuses_options_that_make_no_sense(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """A usage error, before anything is looked at."""
    assert fail(capsys, "cache", *arguments)[0] == 2


def test_cache_refuses_a_bad_budget(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that says what the variable must be."""
    monkeypatch.setenv("TUNER_CACHE_GB", "50 GB")
    problem = "error: TUNER_CACHE_GB: must be a number of gigabytes, 0 or more, got '50 GB'\n"
    assert fail(capsys, "cache") == (8, problem)


def test_cache_offers_every_kind() -> None:
    """The option and the cache know the same kinds."""
    (option,) = (parameter for parameter in cache.params if parameter.name == "kinds")
    assert isinstance(option.type, click.Choice)
    assert tuple(option.type.choices) == KINDS
