"""Commands around a search: init, check, run, confirm, dashboard."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tuner.cli.options import json_option, say, storage_option
from tuner.errors import EXIT_SIGINT, EXIT_SIGTERM

if TYPE_CHECKING:
    from tuner.service.result import StudyStatus
    from tuner.spec.sections import StudySpec

_STOP_CODES = {"sigint": EXIT_SIGINT, "sigterm": EXIT_SIGTERM}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Study file to write.  [default: FOLDER's name + .toml]")
def init(folder: Path, out: Path | None) -> None:
    """Look at a folder of images and write a study file for it.

    \b
    Example:
      tuner init photos/ --out photos.toml
    """
    from tuner.service.initial_study import write_initial_study

    written, summary = write_initial_study(folder, out)
    say(f"{summary}\nwrote {written}; next: {shlex.join(['tuner', 'check', str(written)])}")


@click.command()
@click.argument("study_file", type=click.Path(path_type=Path))
@storage_option
@json_option
def check(study_file: Path, storage: str | None, as_json: bool) -> None:
    """Say what is wrong with a study file, or what it would do.

    \b
    Example:
      tuner check studies/digits.toml
    """
    from tuner.service.plan import describe_plan, make_plan
    from tuner.spec.study import load_spec

    plan = make_plan(load_spec(study_file), storage=storage)
    say(json.dumps(plan.to_json(), indent=2) if as_json else describe_plan(plan))


@click.command()
@click.argument("study_file", type=click.Path(path_type=Path))
@click.option("--trials", type=click.IntRange(min=1), metavar="N", help="New total of trials, instead of the file's.")
@click.option("--timeout", metavar="T", help='Stop starting trials after T, such as "2h" or "90m".')
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Workers, instead of one per device or core.")
@storage_option
@click.option("--quiet", is_flag=True, help="Print the result only.")
@json_option
def run(  # noqa: PLR0917 - click passes each option
    study_file: Path,
    trials: int | None,
    timeout: str | None,
    workers: int | None,
    storage: str | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Search until the study has its trials. Stop it any time: the same command goes on.

    Exit codes: 0 done or timeout, 3-10 as the error says, 130 Ctrl-C, 143 SIGTERM.

    \b
    Example:
      tuner run studies/digits.toml
      tuner run studies/digits.toml --trials 100 --timeout 30m
    """
    from tuner.service.pool import open_pool
    from tuner.spec.study import load_spec

    spec = _override(load_spec(study_file), trials, timeout)
    with open_pool(spec) as pool:  # loads torch while this process loads Optuna
        from tuner.service.coordinator import run_study
        from tuner.service.progress import make_display

        display = make_display(quiet=quiet or as_json)
        status = run_study(spec, storage=storage, n_workers=workers, display=display, pool=pool)
    again = ["run", str(study_file)]
    for option, value in (("--trials", trials), ("--timeout", timeout), ("--workers", workers), ("--storage", storage)):
        again += [] if value is None else [option, str(value)]
    say(json.dumps(status.to_json(), indent=2) if as_json else _conclude(status, again))
    return _STOP_CODES.get(status.stopped_by, 0)


def _override(spec: "StudySpec", trials: int | None, timeout: str | None) -> "StudySpec":
    """Return the spec with what the command line says instead."""
    from tuner.spec.durations import parse_duration

    changes: dict[str, object] = {} if trials is None else {"n_trials": trials}
    if timeout is not None:
        try:
            changes["timeout"] = parse_duration(timeout)
        except ValueError as error:
            raise click.BadParameter(f"{error}, got {timeout!r}", param_hint="--timeout") from error
    return spec.model_copy(update={"search": spec.search.model_copy(update=changes)})


def _conclude(status: "StudyStatus", again: list[str]) -> str:
    """Return the result of a run and the next commands to type."""
    from tuner.search.storage import resolve_url
    from tuner.service.result import describe_status

    lines = [describe_status(status)]
    if status.stopped_by != "done":
        why = {
            "timeout": "the timeout",
            "budget": "the end of its budget",
            "sigint": "Ctrl-C",
            "sigterm": "SIGTERM",
        }[status.stopped_by]
        more = "raise search.budget, then " if status.stopped_by == "budget" else ""
        lines.append(f"stopped by {why}; go on: {more}{shlex.join(['tuner', *again])}")
    if status.best:
        where = [] if status.storage == resolve_url() else ["--storage", status.storage]
        code = ["--allow-code"] if status.best.needs_code else []
        confirm = []
        if status.n_unconfirmed:
            command = shlex.join(["tuner", "confirm", status.name, *code, *where])
            confirm = [f"  {command}   # the best of many is partly luck: train the best few on fresh seeds"]
        best, train, board = (
            shlex.join(["tuner", *arguments, *where])
            for arguments in (
                ["best", status.name, "--format", "toml"],
                ["train", status.name, "--out", "model", *code],
                ["dashboard"],
            )
        )
        lines += [
            "next:",
            *confirm,
            f"  {best}   # the recipe, for your own training",
            f"  {train}   # retrain it on train + val, look at test once",
            f"  {board}   # see every trial",
        ]
    return "\n".join(lines)


@click.command()
@click.argument("study")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Recipes to train again.")
@click.option("--seeds", type=click.IntRange(min=2), default=3, show_default=True, help="Fresh seeds for each.")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Workers, instead of one per device or core.")
@click.option("--allow-code", is_flag=True, help="Let a backbone that is a function of yours be imported.")
@storage_option
@click.option("--quiet", is_flag=True, help="Print the result only.")
@json_option
def confirm(  # noqa: PLR0917 - click passes each option
    study: str,
    top: int,
    seeds: int,
    workers: int | None,
    allow_code: bool,
    storage: str | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Train the best few recipes again on fresh seeds, and say what production will get.

    Of many trials the best is partly the luckiest: its own number is too good. Stop it any time: the same command
    goes on.

    \b
    Example:
      tuner confirm digits --top 5 --seeds 3
    """
    from tuner.service.coordinator import confirm_study
    from tuner.service.progress import make_display

    display = make_display(quiet=quiet or as_json)
    status = confirm_study(
        study,
        top=top,
        n_seeds=seeds,
        storage=storage,
        n_workers=workers,
        allow_code=allow_code,
        display=display,
    )
    again = ["confirm", study, "--top", str(top), "--seeds", str(seeds)]
    again += ["--workers", str(workers)] if workers else []
    again += [*(["--storage", storage] if storage else []), *(["--allow-code"] if allow_code else [])]
    say(json.dumps(status.to_json(), indent=2) if as_json else _conclude(status, again))
    return _STOP_CODES.get(status.stopped_by, 0)


@click.command()
@storage_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Others than this machine then need a token.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 picks a free one.")
@click.option("--write", is_flag=True, help="Let whoever has the printed address change and delete studies.")
def dashboard(storage: str | None, host: str, port: int, write: bool) -> None:
    """Show the studies in optuna-dashboard, read-only, on 127.0.0.1.

    With --write or another host the address holds a token: TUNER_DASHBOARD_TOKEN, else a new one each time.

    \b
    Example:
      tuner dashboard --port 8081
    """
    from tuner.service.dashboard import serve_dashboard

    serve_dashboard(storage, host=host, port=port, writable=write, announce=say)
