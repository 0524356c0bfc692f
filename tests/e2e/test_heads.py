"""Heads from the command line: features once, cohorts, the screen, and what is left when the run is killed."""

import json
from pathlib import Path

import pytest

from tests.e2e.harness import Place, kill, make_place, wait_until
from tests.e2e.test_run import assert_is_whole, read_study

BACKBONES = ("own:fixed", "own:wide")


def make_heads(
    folder: Path, *, search: str = "", training: str = "", name: str = "digits", n_trials: int = 12
) -> Place:
    """Write a study whose trials train heads on known images."""
    place = make_place(folder, name=name, backbones=BACKBONES, n_trials=n_trials, sampler="tpe")
    text = place.study_file.read_text()
    text = text.replace("augmentation_strength = { low = 0.0, high = 1.0 }", "")
    text = text.replace("batch_size = 64", f"batch_size = 64\nunfrozen_layers = 1\n{training}")
    place.study_file.write_text(text.replace("n_trials =", f"{search}\nn_trials ="))
    return place


def test_heads_train_as_cohorts_on_features_that_are_computed_once(tmp_path: Path) -> None:
    """A second study of the same images computes nothing; its best head is retrained and kept like any model."""
    place = make_heads(tmp_path)
    code, output = place.run()
    assert code == 0, output
    assert_is_whole(place, 12)
    attrs = [trial.user_attrs for trial in read_study(place).trials]
    assert {each["features"] for each in attrs} == {"computed", "cached"}
    assert max(each["cohort_size"] for each in attrs) > 1
    assert all(each["saved_seconds"] >= 0 for each in attrs)
    entries = json.loads(place.call("cache", "--kind", "features", "--json")[1])["entries"]
    assert len(entries) == 4  # train and val of two backbones
    code, output = make_heads(tmp_path, name="again").run()
    assert code == 0, output
    assert {trial.user_attrs["features"] for trial in read_study(place, "again").trials} == {"cached"}
    code, output = place.call("train", "digits", "--out", "model", "--allow-code")
    assert code == 0, output
    status = json.loads(place.call("status", "digits", "--json")[1])
    assert (Path(status["model_folder"]) / "model.safetensors").is_file()


def test_screen_counts_apart_and_starts_the_search(tmp_path: Path) -> None:
    """Its trials complete unpruned, besides n_trials; a finished screen is not repeated by a resume."""
    place = make_heads(tmp_path, search="screen = 3")
    code, output = place.run("--trials", "4")
    assert code == 0, output
    assert "screen: 6 head trials besides" in output
    code, output = place.run()
    assert code == 0, output
    trials = read_study(place).trials
    screened = [trial for trial in trials if "screen" in trial.user_attrs]
    assert len(screened) == 6
    assert {trial.state.name for trial in screened} == {"COMPLETE"}
    assert {trial.params["backbone"] for trial in screened} == set(BACKBONES)
    status = json.loads(place.call("status", "digits", "--json")[1])
    assert (status["n_screen"], status["counts"]["COMPLETE"] + status["counts"]["PRUNED"]) == (6, 12)


@pytest.mark.parametrize("n_done", [1, 9])
def test_killed_run_of_cohorts_resumes_to_the_exact_count(tmp_path: Path, n_done: int) -> None:
    """Whatever the moment: in the screen, between cohorts or in one."""
    place = make_heads(tmp_path, search="screen = 3")
    process = place.start_run()
    wait_until(lambda: place.count_trials("COMPLETE", "PRUNED") >= n_done)
    kill(process.pid)
    process.communicate()
    code, output = place.run()
    assert code == 0, output
    trials = read_study(place).trials
    assert sum("screen" in trial.user_attrs for trial in trials if trial.state.name == "COMPLETE") == 6
    counted = [trial for trial in trials if trial.state.name != "FAIL" and "screen" not in trial.user_attrs]
    assert len(counted) == 12
    assert place.count_trials("RUNNING") == 0


def test_cohort_that_dies_with_its_worker_is_trained_again_one_by_one(tmp_path: Path) -> None:
    """What killed the worker may be one of its trials, which must not take the others along a second time."""
    place = make_heads(tmp_path)
    place.study_file.write_text(place.study_file.read_text().replace("own:fixed", "own:mortal"))
    code, output = place.run()
    assert code == 0, output
    assert_is_whole(place, 12)
    trials = read_study(place).trials
    lost = {trial.number for trial in trials if trial.user_attrs.get("reason") == "worker_lost"}
    retries = [trial for trial in trials if trial.user_attrs.get("retry_of") in lost]
    assert len(retries) == len(lost) > 0
    assert {(trial.user_attrs["features"], trial.user_attrs["cohort_size"]) for trial in retries} == {("none", 1)}


def test_diverged_head_leaves_its_cohort_alone(tmp_path: Path) -> None:
    """It is infeasible by itself; the others complete."""
    place = make_heads(tmp_path, training='optimizer = "sgd"')
    text = place.study_file.read_text()
    place.study_file.write_text(text.replace("{ low = 1e-4, high = 1e-2, log = true }", "{ choices = [0.01, 1e38] }"))
    code, output = place.run()
    assert code == 0, output
    for trial in read_study(place).trials:
        expected = "COMPLETE" if trial.params["lr"] == 0.01 else "PRUNED"
        assert trial.state.name == expected or trial.user_attrs["reason"] == "pruner"
        assert trial.user_attrs["feasible"] is (trial.params["lr"] == 0.01)


def test_head_of_a_random_body_trains_on_images_and_the_run_says_why(tmp_path: Path) -> None:
    """What is drawn anew for every trial cannot be kept."""
    place = make_heads(tmp_path, n_trials=4)
    place.study_file.write_text(place.study_file.read_text().replace("own:fixed", "own:good"))
    code, output = place.run()
    assert code == 0, output
    assert_is_whole(place, 4)
    said = "own:good: its heads train on images, not on features: its weights are drawn anew for every trial"
    for trial in read_study(place).trials:
        assert (trial.user_attrs["features"] == "none") is (trial.params["backbone"] == "own:good")
    if any(trial.params["backbone"] == "own:good" for trial in read_study(place).trials):
        assert said in output


def test_check_says_which_heads_cannot_use_kept_features(tmp_path: Path) -> None:
    """Fresh views of augmented images never repeat; fixed ones do."""
    place = make_heads(tmp_path, training="augmentation_strength = 0.5")
    assert "train on images, not on kept features" in place.call("check", str(place.study_file))[1]
    place = make_heads(tmp_path, training="augmentation_strength = 0.5\nviews = 2")
    assert "kept features" not in place.call("check", str(place.study_file))[1]


def test_deeper_trials_start_from_the_screens_head_up_to_production(tmp_path: Path) -> None:
    """Over a kill: searched, confirmed on fresh seeds and retrained, each from a head of its own."""
    place = make_heads(tmp_path, search="screen = 2", training='head_start = "screen"', n_trials=6)
    text = place.study_file.read_text()
    text = text.replace("unfrozen_layers = 1\n", "").replace("[space]\n", "[space]\nunfrozen_layers = [1, 2]\n")
    place.study_file.write_text(text.replace("[1, 2]", "{ low = 1, high = 2 }"))
    process = place.start_run()
    wait_until(lambda: place.count_trials("COMPLETE", "PRUNED") >= 5)
    kill(process.pid)
    process.communicate()
    code, output = place.run()
    assert code == 0, output
    trials = read_study(place).trials
    recipes = {trial.number: trial.user_attrs["params_resolved"] for trial in trials}
    deeper = {number for number, recipe in recipes.items() if recipe["unfrozen_layers"] > 1}
    assert deeper
    assert {number for number, recipe in recipes.items() if "head_start" in recipe} == deeper
    heads = [recipes[trial.number]["seed"] for trial in trials if "screen" in trial.user_attrs]
    assert {recipes[number]["head_start"]["seed"] for number in deeper} <= set(heads)
    chosen = str(min(number for number in deeper if trials[number].state.name == "COMPLETE"))
    code, output = place.call("confirm", "digits", "--top", "6", "--seeds", "2", "--allow-code")
    assert code == 0, output
    confirming = [trial.user_attrs for trial in read_study(place).trials if "confirms" in trial.user_attrs]
    fresh = [each["params_resolved"] for each in confirming if each["confirms"]["trial"] in deeper]
    assert fresh
    assert all(recipe["head_start"]["seed"] == recipe["seed"] for recipe in fresh)
    code, output = place.call("train", "digits", "--out", "model", "--allow-code", "--trial", chosen, "--device", "cpu")
    assert code == 0, output
    assert "the head alone, epoch 1 of " in output
    card = json.loads((place.folder / "model" / "model_card.json").read_text())
    assert card["recipe"]["head_start"] == recipes[int(chosen)]["head_start"]
