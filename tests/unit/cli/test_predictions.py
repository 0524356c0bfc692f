"""Predictions as lines, CSV and JSON."""

import csv
import io
import json
from pathlib import Path
from typing import Literal

import pytest

from tuner.cli.predictions import PredictionWriter
from tuner.production.predictor import Prediction

CLASSES = ("cat", "dog, wild")
PREDICTIONS = (
    Prediction(path=Path("a.png"), label="cat", probability=0.75, probabilities={"cat": 0.75, "dog, wild": 0.25}),
    Prediction(path=Path("broken\x1b.png"), error="cannot identify image file"),
    Prediction(path=Path("b.png"), label="dog, wild", probability=1.0, probabilities={"cat": 0.0, "dog, wild": 1.0}),
)


def write(form: Literal["text", "csv", "json"], predictions: tuple[Prediction, ...] = PREDICTIONS) -> int:
    """Print all predictions; return how many files were skipped."""
    writer = PredictionWriter(CLASSES, form)
    for prediction in predictions:
        writer.write(prediction)
    writer.end()
    return writer.n_skipped


def test_csv_has_a_column_for_each_class(capsys: pytest.CaptureFixture[str]) -> None:
    """Commas in names are quoted; files that cannot be read are on stderr alone."""
    assert write("csv") == 1
    shown = capsys.readouterr()
    rows = list(csv.reader(io.StringIO(shown.out)))
    assert rows == [
        ["path", "label", "probability", *CLASSES],
        ["a.png", "cat", "0.75", "0.75", "0.25"],
        ["b.png", "dog, wild", "1.0", "0.0", "1.0"],
    ]
    assert shown.err == "skipped broken?.png: cannot identify image file\n"


@pytest.mark.parametrize("predictions", [(), PREDICTIONS[:1], PREDICTIONS])
def test_json_is_one_document(predictions: tuple[Prediction, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """However many there are, printed one by one."""
    write("json", predictions)
    assert json.loads(capsys.readouterr().out) == [prediction.to_json() for prediction in predictions]


def test_text_is_a_line_for_each_file(capsys: pytest.CaptureFixture[str]) -> None:
    """Path, label and probability, between tabs."""
    write("text")
    assert capsys.readouterr().out == "a.png\tcat\t0.7500\nb.png\tdog, wild\t1.0000\n"
