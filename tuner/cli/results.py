"""Commands that read, copy or delete what studies have found."""

import csv
import io
import json
import shlex
from pathlib import Path
from typing import Any

import click

from tuner.cli.options import format_table, format_value, json_option, say, storage_option
from tuner.spec.printable import as_printable


@click.command("list")
@storage_option
@json_option
def list_(storage: str | None, as_json: bool) -> None:
    """List the studies of a storage.

    \b
    Example:
      tuner list
    """
    from tuner.production.reading import read_summaries

    summaries = read_summaries(storage)
    if as_json:
        click.echo(json.dumps([vars(summary) for summary in summaries], indent=2))
        return
    rows = [
        (
            summary.name,
            f"{summary.n_finished}/{summary.n_trials if summary.n_trials is not None else '?'}",
            summary.objective,
            format_value(summary.best_value),
        )
        for summary in summaries
    ]
    say(format_table(("STUDY", "TRIALS", "OBJECTIVE", "BEST"), rows) if rows else "no studies")


@click.command()
@click.argument("study")
@storage_option
@json_option
def status(study: str, storage: str | None, as_json: bool) -> None:
    """Say how far a study is, why trials did not complete, and which is the best.

    \b
    Example:
      tuner status digits --json
    """
    from tuner.production.reading import read_study_status
    from tuner.service.result import describe_status

    found = read_study_status(study, storage)
    say(json.dumps(found.to_json(), indent=2) if as_json else describe_status(found))


@click.command()
@click.argument("study")
@storage_option
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values with every param.")
def trials(study: str, storage: str | None, as_csv: bool) -> None:
    """List the trials of a study.

    \b
    Example:
      tuner trials digits --csv > trials.csv
    """
    from tuner.production.reading import list_trials

    rows = list_trials(study, storage)
    header = list(rows[0]) if rows else ["number"]
    if as_csv:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(map(_for_cell, header))
        writer.writerows([_for_cell(value) for value in row.values()] for row in rows)
        click.echo(text.getvalue(), nl=False)
        return
    say(format_table([name.upper() for name in header], [[_short(value) for value in row.values()] for row in rows]))


def _for_cell(value: Any) -> Any:
    """Return a value for CSV, which is looked at in terminals too; csv itself takes None as nothing."""
    return as_printable(value) if isinstance(value, str) else value


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@click.command()
@click.argument("study")
@click.argument("number", type=click.IntRange(min=0))
@storage_option
@json_option
def show(study: str, number: int, storage: str | None, as_json: bool) -> None:
    """Show one trial: its params, its curve, and why it ended.

    \b
    Example:
      tuner show digits 12
    """
    from tuner.production.reading import describe_trial, read_trial

    trial = read_trial(study, number, storage)
    say(json.dumps(trial, indent=2) if as_json else describe_trial(trial))


@click.command()
@click.argument("study")
@click.option("--format", "form", type=click.Choice(["toml", "json"]), default="toml", show_default=True)
@storage_option
def best(study: str, form: str, storage: str | None) -> None:
    """Print the best trial's recipe, ready for another program.

    \b
    Example:
      tuner best digits --format json
    """
    from tuner.production.best import best_params, write_toml

    params = best_params(study, storage=storage)
    click.echo(json.dumps(params, indent=2) if form == "json" else write_toml(params), nl=form == "json")


@click.command()
@click.argument("study")
@click.option("--out", type=click.Path(path_type=Path), help="HTML file to write.  [default: STUDY.html]")
@storage_option
def report(study: str, out: Path | None, storage: str | None) -> None:
    """Write a study as one HTML file that needs no network.

    Curves, importance, value against cost, confusion matrix, calibration, failures, device time.

    \b
    Example:
      tuner report digits --out digits.html
    """
    from tuner.production.report import write_report
    from tuner.search.storage import study_slug

    say(f"wrote {write_report(study, out or Path(f'{study_slug(study)}.html'), storage=storage)}")


@click.command()
@click.argument("study")
@storage_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(study: str, storage: str | None, yes: bool) -> None:
    """Delete a study, its trials and its kept models. Asks first.

    \b
    Example:
      tuner delete digits
    """
    from tuner.production.reading import delete_study, read_study_status

    found = read_study_status(study, storage)
    if not yes:
        n_trials = sum(found.counts.values())
        click.confirm(f"Delete study {study!r} with {n_trials} trials from {found.storage}?", abort=True)
    delete_study(study, storage)
    say(f"deleted {study!r}")


@click.command()
@click.argument("dest", type=click.Path(path_type=Path))
@storage_option
@click.option("--force", is_flag=True, help="Replace DEST if it exists.")
def backup(dest: Path, storage: str | None, force: bool) -> None:
    """Copy the database into one file, also while studies run. Kept models are not copied.

    \b
    Example:
      tuner backup monday.db
      tuner list --storage sqlite:///monday.db
    """
    from tuner.search.backup import back_up
    from tuner.search.storage import files_folder, resolve_url

    url = resolve_url(storage)
    copy = back_up(url, dest, force=force)
    say(f"wrote {copy.path}: {copy.n_studies} studies, {copy.n_bytes / 1e6:.1f} MB, checked")
    say(f"the models in {files_folder(url)} are not in it")
    say(f"use it: {shlex.join(['tuner', 'list', '--storage', f'sqlite:///{copy.path}'])}")
