"""From a search to a model that is worth what it says: confirm, train, verify, evaluate, report, as a user does."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Place, make_place, wait_until

pytestmark = pytest.mark.xdist_group("honest_numbers")


def set_keys(place: Place, section: str, lines: str) -> None:
    """Add keys to a section of the study file."""
    text = place.study_file.read_text()
    place.study_file.write_text(text.replace(f"[{section}]\n", f"[{section}]\n{lines}\n"))


def read_status(place: Place, study: str = "digits") -> dict[str, Any]:
    """Return what ``tuner status --json`` prints."""
    code, output = place.call("status", study, "--json")
    assert code == 0, output
    status: dict[str, Any] = json.loads(output)
    return status


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A study that was searched and confirmed within a budget, and its model."""
    place = make_place(tmp_path_factory.mktemp("honest"), backbones=("tuner:small_cnn",), epochs=2, n_trials=4)
    set_keys(place, "search", 'confirm_fraction = 0.3\nbudget = "1 gpu-hours"')
    code, output = place.run()
    assert code == 0, output
    assert "budget 1 gpu-hours: 30 min left on 2 devices: 21 min to search, the rest to confirm" in output
    assert "confirming the best 4 on 3 fresh seeds each" in output
    code, output = place.call("train", "digits", "--out", "model", "--seeds", "2", "--device", "cpu")
    assert code == 0, output
    assert "test accuracy of 2 seeds: " in output
    return place


def test_run_ends_with_a_confirmed_winner(place: Place) -> None:
    """Four candidates, three seeds each, in JSON and in words; the bill adds up; a second run has nothing to do."""
    status = read_status(place)
    confirmation, ledger = status["confirmation"], status["ledger"]
    assert len(confirmation["candidates"]) == 4
    assert all(len(each["values"]) == 3 for each in confirmation["candidates"])
    prediction = confirmation["prediction"]
    assert prediction["low"] <= prediction["accuracy"] <= prediction["high"]
    assert confirmation["winner"] == confirmation["candidates"][0]["trial"]
    parts = sum(ledger[name] for name in ("build", "train", "evaluate", "pruned", "failed", "confirm", "idle"))
    assert parts == pytest.approx(ledger["held"], abs=1.0)
    assert min(ledger[name] for name in ("train", "evaluate", "confirm", "retrain", "wall")) > 0
    assert status["n_trials"] == sum(status["counts"].values()) == 4
    code, output = place.run()
    assert code == 0, output
    assert "worker 0" not in output
    assert "prediction: accuracy " in output


def test_production_takes_the_confirmed_recipe(place: Place) -> None:
    """Best and train agree with the confirmation, whatever the search's own number said."""
    winner = read_status(place)["confirmation"]["winner"]
    best = json.loads(place.call("best", "digits", "--format", "json")[1])
    metrics = json.loads((place.folder / "model" / "metrics.json").read_text())
    card = json.loads((place.folder / "model" / "model_card.json").read_text())
    assert best["trial"]["number"] == metrics["search"]["trial"] == card["search"]["trial"] == winner
    assert best["confirmed"] == metrics["confirmed"]
    assert len(metrics["test"]["accuracies"]) == len(metrics["seeds"]) == 2
    assert metrics["test"]["accuracies"][0] == metrics["test"]["accuracy"]
    text = (place.folder / "model" / "model_card.md").read_text()
    assert f"trial {winner} of 16" in text
    assert "## Limits" in text


def test_verify_trains_from_the_card_alone(place: Place) -> None:
    """Without the study's database; a card whose learning rate was changed tenfold does not hold, exit code 12."""
    alone = place.folder / "elsewhere"
    for name, factor in (("same", 1), ("changed", 10)):
        alone.mkdir(exist_ok=True)
        shutil.copytree(place.folder / "model", alone / name)
        path = alone / name / "model_card.json"
        card = json.loads(path.read_text())
        card["recipe"]["lr"] *= factor
        path.write_text(json.dumps(card))
        (alone / name / "model.safetensors").unlink()  # nothing but the card is needed
    database = place.folder / "studies.db"
    database.rename(place.folder / "hidden.db")
    try:
        code, output = place.call("verify", "elsewhere/same", "--runs", "1", "--json", "--device", "cpu")
        assert code == 0, output
        same = json.loads(output)
        code, output = place.call("verify", "elsewhere/changed", "--runs", "1", "--device", "cpu")
    finally:
        (place.folder / "hidden.db").rename(database)
    assert same["accuracy"] == pytest.approx(same["card_accuracy"], abs=0.02)
    assert same["loss"] == pytest.approx(same["card_loss"], rel=0.1)
    assert code == 12, output
    assert "NOT verified" in output


def test_evaluate_looks_at_test_on_the_record(place: Place) -> None:
    """The same number as the first look, which is told of; predictions agree in every form."""
    code, output = place.call("evaluate", "model", "--out", "looked", "--device", "cpu")
    assert code == 0, output
    assert "looking at test once: " in output
    assert "; earlier looks: 1, " in output
    first, second = (
        json.loads((place.folder / name / "metrics.json").read_text())["test"] for name in ("model", "looked")
    )
    assert second["confusion_matrix"] == first["confusion_matrix"]
    assert second["temperature"] == first["temperature"]
    assert sorted(path.name for path in (place.folder / "looked").iterdir()) == [
        "calibration.png",
        "confusion_matrix.png",
        "metrics.json",
        "scores.png",
    ]


def test_report_needs_no_network(place: Place) -> None:
    """One file with every section and picture, and nothing to fetch or to run."""
    code, output = place.call("report", "digits")
    assert code == 0, output
    text = (place.folder / "digits.html").read_text()
    for title in ("Confirmation", "Search", "Curves", "Importance", "Value against cost", "Confusion matrix"):
        assert f"<h2>{title}</h2>" in text
    assert "<h2>Calibration on test</h2>" in text
    assert text.count("<svg") == 7
    assert "<script" not in text
    assert "src=" not in text
    fetched = [part for part in text.split('href="')[1:] if not part.startswith(("#", "data:image/png;"))]
    assert not fetched


def test_confirm_goes_on_after_a_kill(tmp_path: Path) -> None:
    """So it does after Ctrl-C. What was trained before counts, and the search gets no trial from it."""
    place = make_place(tmp_path, backbones=("own:slow",), epochs=2, n_trials=2)
    assert place.run()[0] == 0
    code, output = place.call("confirm", "digits")
    assert code == 6, output
    assert "allow code (--allow-code)" in output
    arguments = ("confirm", "digits", "--seeds", "2", "--workers", "2", "--allow-code")
    process = place.start(*arguments)
    wait_until(lambda: place.count_trials("RUNNING") > 0)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert read_status(place)["confirmation"] is None  # of half of the trainings nothing is said
    process = place.start(*arguments)
    wait_until(lambda: place.count_trials("COMPLETE") >= 3)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    n_before = place.count_trials("COMPLETE")
    code, output = place.call(*arguments)
    assert code == 0, output
    status = read_status(place)
    assert [len(each["values"]) for each in status["confirmation"]["candidates"]] == [2, 2]
    assert place.count_trials("COMPLETE") == 2 + 4
    assert n_before >= 3
    assert (status["counts"]["COMPLETE"], status["counts"]["WAITING"]) == (2, 0)


def test_budget_ends_a_run_within_an_epoch(tmp_path: Path) -> None:
    """Trials that would take minutes are stopped at an epoch's end and queued again; the bill says what was held."""
    place = make_place(tmp_path, backbones=("own:slow",), epochs=2000, n_trials=50)
    set_keys(place, "search", 'budget = "40s"')
    code, output = place.run()
    assert code == 0, output
    assert "stopped by the end of its budget; go on: raise search.budget, then tuner run" in output
    status = read_status(place)
    n_stopped = status["counts"]["FAIL"]  # of the two that had begun, on a slow machine fewer
    assert n_stopped == status["counts"]["WAITING"] > 0
    assert status["reasons"] == {"FAIL: interrupted": n_stopped}
    assert 40 <= status["ledger"]["wall"] < 100
    code, output = place.run()
    assert code == 0, output
    assert "worker 0" not in output
    assert "stopped by the end of its budget" in output


def test_trial_of_folds_and_seeds_is_the_same_again(tmp_path: Path) -> None:
    """Two databases, one study file: every value of every fold and seed is bit-equal on a CPU."""
    place = make_place(tmp_path, backbones=("tuner:small_cnn",), epochs=1, n_trials=1)
    set_keys(place, "data", "folds = 2")
    set_keys(place, "search", "seeds_per_trial = 2")
    found = []
    for name in ("one", "two"):
        url = f"sqlite:///{name}.db"
        assert place.run("--storage", url)[0] == 0
        trial = json.loads(place.call("show", "digits", "0", "--storage", url, "--json")[1])
        found.append((trial["value"], trial["repeat_values"]))
    assert found[0] == found[1]
    assert len(found[0][1]) == 4
    assert len(set(found[0][1])) > 1
