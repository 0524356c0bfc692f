"""The commands after a search, as a user types them one after the other."""

import csv
import io
import json
import os
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.e2e.harness import Place, make_place
from tuner.data.index import Split
from tuner.data.sources import read_index
from tuner.data.splits import cut_splits
from tuner.spec.study import load_spec

pytestmark = pytest.mark.xdist_group("commands")  # one study for all


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A finished study of four trials."""
    place = make_place(tmp_path_factory.mktemp("finished"), n_trials=4, epochs=2)
    code, output = place.run("--quiet")
    assert code == 0, output
    return place


def test_list_status_trials_and_show_agree(place: Place) -> None:
    """Every reading command tells the same story."""
    assert "digits" in place.call("list")[1]
    status = json.loads(place.call("status", "digits", "--json")[1])
    assert status["counts"]["COMPLETE"] + status["counts"]["PRUNED"] == status["n_trials"] == 4
    rows = list(csv.DictReader(io.StringIO(place.call("trials", "digits", "--csv")[1])))
    assert len(rows) == 4
    best = status["best"]
    assert float(rows[best["number"]]["value"]) == best["value"]
    shown = json.loads(place.call("show", "digits", str(best["number"]), "--json")[1])
    assert shown["epochs"][-1]["val_accuracy"] == best["value"]
    assert sum(map(sum, shown["class_report"]["confusion_matrix"])) > 0


def test_check_says_what_a_run_would_resume(place: Place) -> None:
    """Before any training: how many trials there are, and that another recipe would be refused."""
    code, output = place.call("check", str(place.study_file))
    assert code == 0, output
    assert "storage: goes on after 4 trials" in output
    other = place.folder / "other.toml"
    other.write_text(place.study_file.read_text().replace("epochs = 2", "epochs = 3"))
    code, output = place.call("check", str(other))
    assert code == 4
    assert "training.epochs: 2 in the study, 3 in the study file" in output


def test_best_prints_a_recipe_that_other_programs_can_read(place: Place) -> None:
    """TOML and JSON hold the same resolved recipe."""
    from_json = json.loads(place.call("best", "digits", "--format", "json")[1])
    assert tomllib.loads(place.call("best", "digits", "--format", "toml")[1]) == from_json
    assert from_json["params"]["unfrozen_layers"] == 2  # "all" of the user's net: body and classifier
    assert from_json["data"]["classes"] == ["7", "8", "9"]


def test_train_and_predict_reuse_the_best_recipe(place: Place) -> None:
    """The model folder predicts on its own; a broken image is skipped with exit code 11."""
    code, output = place.call("train", "digits", "--out", "model")
    assert code == 6
    assert "--allow-code" in output
    code, output = place.call("train", "digits", "--out", "model", "--allow-code")
    assert code == 0, output
    metrics = json.loads((place.folder / "model" / "metrics.json").read_text())
    assert metrics["test"]["n_images"] > 0
    assert (place.folder / "model" / "confusion_matrix.png").is_file()
    photos = place.folder / "photos"
    photos.mkdir()
    image = load_digits().images[7]
    Image.fromarray((image * 255 / 16).astype(np.uint8)).save(photos / "seven ü.png")
    (photos / "broken.png").write_bytes(b"")
    code, output = place.call("predict", "model", "photos", "--allow-code")
    assert code == 11
    assert "skipped photos/broken.png" in output
    assert output.split("seven ü.png\t")[1].split("\t")[0] in {"7", "8", "9"}


@pytest.fixture
def dashboard(place: Place) -> Iterator[str]:
    """The dashboard's address while it runs."""
    process = place.start("dashboard", "--port", "0")
    assert process.stdout is not None
    line = process.stdout.readline()
    try:
        yield line.split(" on ")[1].split()[0]
    finally:
        process.kill()
        process.communicate()


def fetch(url: str, *, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    """Return the status and body of a request."""
    request = urllib.request.Request(  # noqa: S310 - a loopback address
        url, method=method, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_dashboard_shows_the_study_and_changes_nothing(dashboard: str) -> None:
    """Values, params and attributes are there; writing and foreign hosts are refused."""
    (study,) = json.loads(fetch(f"{dashboard}api/studies")[1])["study_summaries"]
    detail = json.loads(fetch(f"{dashboard}api/studies/{study['study_id']}?after=0")[1])
    assert len(detail["trials"]) == 4
    trial = detail["trials"][0]
    assert {param["name"] for param in trial["params"]} == {"backbone", "lr", "augmentation_strength"}
    assert len(trial["intermediate_values"]) == 2
    assert {attr["key"] for attr in trial["user_attrs"]} >= {"unfrozen_layers_resolved", "seconds", "images_per_second"}
    assert fetch(f"{dashboard}dashboard/")[0] == 200
    assert fetch(f"{dashboard}api/studies/{study['study_id']}", method="DELETE")[0] == 405
    assert fetch(f"{dashboard}api/studies", Host="evil.example")[0] == 421


def test_delete_asks_first_and_removes_the_models(tmp_path: Path) -> None:
    """Nothing goes without a yes."""
    place = make_place(tmp_path, n_trials=1, epochs=1)
    assert place.run("--quiet")[0] == 0
    code, output = place.call("delete", "digits")
    assert code == 2
    assert "Delete study 'digits' with 1 trials" in output
    assert "nothing was changed" in output
    assert place.call("status", "digits")[0] == 0
    assert place.call("delete", "digits", "--yes")[0] == 0
    assert place.call("status", "digits")[0] == 4
    assert not (tmp_path / "studies.db.models" / "digits").exists()


def test_init_writes_a_study_file_that_check_accepts(tmp_path: Path) -> None:
    """From a folder of images to a study without writing a line."""
    digits = load_digits()
    for number in range(60):
        image = Image.fromarray((digits.images[number] * 255 / 16).astype(np.uint8))
        folder = tmp_path / "photos" / f"class {digits.target[number] % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    place = make_place(tmp_path)
    code, output = place.call("init", "photos")
    assert code == 0, output
    assert "60 images in 2 classes" in output
    text = (tmp_path / "photos.toml").read_text()
    text = text.replace(
        '["resnet50.a1_in1k", "convnext_tiny.in12k_ft_in1k", "mobilenetv3_large_100.ra_in1k"]', '["test_vit"]'
    )
    (tmp_path / "photos.toml").write_text(text + '\n[backbones.test_vit]\nweights = "random"\n')
    code, output = place.call("check", "photos.toml")
    assert code == 0, output
    assert "test_vit:" in output
    assert "at most about" in output


def test_locked_test_split_is_not_opened_by_a_run(tmp_path: Path) -> None:
    """With test files that nobody could decode, a run succeeds; only ``train`` meets them."""
    generator = np.random.default_rng(0)
    for split, n_images in (("train", 12), ("val", 6), ("test", 3)):
        for label in ("dark", "light"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(n_images):
                pixels = generator.integers(0, 100, (20, 20, 3)) + (150 if label == "light" else 0)
                path = folder / f"{number}.png"
                if split == "test" and number == 0:
                    os.mkfifo(path)
                elif split == "test":
                    path.write_bytes(b"not an image")
                else:
                    Image.fromarray(pixels.astype(np.uint8)).save(path)
    place = make_place(tmp_path, n_trials=2, epochs=2)
    text = place.study_file.read_text().replace("batch_size = 64", "batch_size = 8")
    text = text.replace('source = "digits"\nclasses = ["7", "8", "9"]', 'source = "image_folder"\npath = "images"')
    place.study_file.write_text(text)
    code, output = place.run()
    assert code == 0, output
    code, output = place.call("train", "digits", "--out", "model", "--allow-code")
    assert code == 5, output
    assert "not an image" in output
    assert "must be a file, got a pipe" in output


def test_locked_test_split_that_is_cut_from_train_is_not_opened(tmp_path: Path) -> None:
    """The files that the cut put aside can become unreadable: the study goes on, for no search code reads them."""
    generator = np.random.default_rng(0)
    for label, low in (("dark", 0), ("light", 150)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(20):
            pixels = (generator.integers(0, 100, (20, 20, 3)) + low).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    place = make_place(tmp_path, n_trials=2, epochs=2)
    text = place.study_file.read_text().replace("batch_size = 64", "batch_size = 8")
    text = text.replace('source = "digits"\nclasses = ["7", "8", "9"]', 'source = "image_folder"\npath = "images"')
    place.study_file.write_text(text)
    assert place.run("--quiet")[0] == 0
    section = load_spec(place.study_file).data
    index = read_index(section)
    for row in np.flatnonzero(cut_splits(index, section, seed=0) == Split.TEST):
        (tmp_path / "images" / index.names[row]).write_bytes(b"")
    code, output = place.run("--trials", "3")
    assert code == 0, output
    assert "3 of 3 trials" in output
