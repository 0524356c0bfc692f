"""Predictions as they come, batch by batch: lines for a person, CSV or one JSON document."""

import csv
import io
import json
from typing import TYPE_CHECKING, Literal

import click

from tuner.spec.printable import as_printable

if TYPE_CHECKING:
    from tuner.production.predictor import Prediction


class PredictionWriter:
    """Prints predictions one by one, so that a million of them need no memory. Mutable.

    Args:
        classes: Columns of the CSV.
        form: ``text``, ``csv`` or ``json``.
    """

    def __init__(self, classes: tuple[str, ...], form: Literal["text", "csv", "json"]) -> None:
        self._classes, self._form = classes, form
        self._n_written = 0
        self.n_skipped = 0
        """Files that could not be read."""
        match form:
            case "csv":
                self._write_row(["path", "label", "probability", *classes])
            case "json":
                click.echo("[", nl=False)

    def write(self, prediction: "Prediction") -> None:
        """Print one prediction; a file that could not be read is named on stderr."""
        if prediction.error is not None:
            self.n_skipped += 1
            click.echo(as_printable(f"skipped {prediction.path}: {prediction.error}"), err=True)
        match self._form:
            case "json":
                text = json.dumps(prediction.to_json(), indent=2).replace("\n", "\n  ")
                click.echo(("," if self._n_written else "") + f"\n  {text}", nl=False)
                self._n_written += 1
            case "csv" if prediction.error is None:
                probabilities = [prediction.probabilities[name] for name in self._classes]
                self._write_row([prediction.path, prediction.label, prediction.probability, *probabilities])
            case "text" if prediction.error is None:
                path, label = as_printable(prediction.path), as_printable(prediction.label)
                click.echo(f"{path}\t{label}\t{prediction.probability:.4f}")

    def end(self) -> None:
        """Print what follows the last one."""
        if self._form == "json":
            click.echo("\n]" if self._n_written else "]")

    @staticmethod
    def _write_row(cells: list[object]) -> None:
        text = io.StringIO()
        # Looked at in terminals too; numbers have nothing to hide there.
        shown = [cell if isinstance(cell, float) else as_printable(cell) for cell in cells]
        csv.writer(text, lineterminator="\n").writerow(shown)
        click.echo(text.getvalue(), nl=False)
