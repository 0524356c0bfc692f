"""Commands that turn a search into a model in use: train, verify, evaluate, predict, export."""

import json
import sys
from pathlib import Path

import click

from tuner.cli.options import json_option, say, storage_option
from tuner.cli.predictions import PredictionWriter
from tuner.errors import EXIT_NOT_VERIFIED, EXIT_SKIPPED


@click.command()
@click.argument("study")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Model folder to write.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Models; the first is kept.")
@click.option("--trial", type=click.IntRange(min=0), metavar="N", help="Another recipe than the confirmed best.")
@click.option("--allow-code", is_flag=True, help="Let a backbone that is a function of yours be imported.")
@storage_option
def train(  # noqa: PLR0917 - click passes each option
    study: str, out: Path, device: str, seeds: int, trial: int | None, allow_code: bool, storage: str | None
) -> None:
    """Retrain the best recipe on train + val, and look at the test split once.

    The recipe is the confirmed best, else the best of the search. It is also trained on train alone, so that val can
    calibrate its probabilities.

    \b
    Example:
      tuner train digits --out model/
      tuner train digits --out model/ --seeds 3
    """
    from tuner.production.retrain import train_best
    from tuner.production.train_result import describe_result

    result = train_best(
        study,
        out,
        storage=storage,
        device=device,
        allow_code=allow_code,
        trial=trial,
        n_seeds=seeds,
        announce=say,
    )
    say(describe_result(result))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@click.option("--runs", type=click.IntRange(min=1), metavar="N", help="Trainings.  [default: those that confirmed it]")
@click.option("--allow-code", is_flag=True, help="Let a backbone that is a function of yours be imported.")
@json_option
def verify(folder: Path, device: str, runs: int | None, allow_code: bool, as_json: bool) -> int:
    """Train a model folder's recipe again from its card alone, and say whether the card holds.

    In an empty folder and a new process, on the study's images but for test. The exit code is 12 if the card does
    not hold.

    \b
    Example:
      tuner verify model/
    """
    from tuner.production.verifying import describe_verification, verify_folder

    found = verify_folder(folder, device=device, n_runs=runs, allow_code=allow_code)
    say(json.dumps(found.to_json(), indent=2) if as_json else describe_verification(found))
    return 0 if found.is_verified else EXIT_NOT_VERIFIED


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--study", metavar="NAME", help="Whose test split.  [default: of the study that the model comes from]")
@click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Write numbers and pictures there.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@click.option("--allow-code", is_flag=True, help="Let a backbone that is a function of yours be imported.")
@storage_option
@json_option
def evaluate(  # noqa: PLR0917 - click passes each option
    folder: Path,
    study: str | None,
    out: Path | None,
    device: str,
    allow_code: bool,
    storage: str | None,
    as_json: bool,
) -> None:
    """Look at a study's locked test split with a model folder. The look is written into the study.

    Every look makes the next one less unbiased: 'tuner train' has taken the first.

    \b
    Example:
      tuner evaluate model/
    """
    from tuner.production.evaluation import evaluate_folder
    from tuner.production.train_result import describe_test

    found = evaluate_folder(
        folder,
        study=study,
        storage=storage,
        out=out,
        device=device,
        allow_code=allow_code,
        announce=lambda text: say(text, err=as_json),
    )
    say(json.dumps(found.to_json(), indent=2) if as_json else "\n".join(describe_test(found.test)))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.argument("images", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Images at a time.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@click.option("--allow-code", is_flag=True, help="Let a backbone that is a function of yours be imported.")
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values: path, label, and each probability.")
@json_option
def predict(  # noqa: PLR0917 - click passes each option
    folder: Path,
    images: tuple[Path, ...],
    batch: int,
    device: str,
    allow_code: bool,
    as_csv: bool,
    as_json: bool,
) -> int:
    """Classify images, or all images of folders, with a model folder.

    Files that cannot be read are named on stderr and left out; the exit code is then 11. Probabilities are those at
    the temperature that val was calibrated with.

    \b
    Example:
      tuner predict model/ photo.jpg more_photos/
      tuner predict model/ more_photos/ --csv > labels.csv
    """
    from tuner.production.predictor import find_images, load

    if as_csv and as_json:
        raise click.UsageError("--csv and --json do not go together.")
    predictor = load(folder, device=device, allow_code=allow_code)
    paths = find_images(images)
    writer = PredictionWriter(predictor.classes, "csv" if as_csv else "json" if as_json else "text")
    with click.progressbar(
        predictor.stream(paths, batch_size=batch),
        length=len(paths),
        label="predicting",
        file=sys.stderr,
        hidden=not sys.stderr.isatty() or sys.stdout.isatty(),  # two that write to one terminal spoil both
    ) as predictions:
        for prediction in predictions:
            writer.write(prediction)
    writer.end()
    return EXIT_SKIPPED if writer.n_skipped else 0


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--format", "form", type=click.Choice(["timm", "hf", "onnx", "torch"]), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="Folder to write.")
@click.option("--allow-code", is_flag=True, help="Let a backbone that is a function of yours be imported.")
def export(folder: Path, form: str, out: Path, allow_code: bool) -> None:
    """Write a model folder's model for another program: timm, Hugging Face, ONNX or torch.export.

    What the other program does otherwise is said on stderr, a line each.

    \b
    Example:
      tuner export model/ --format onnx --out model-onnx/
    """
    from tuner.production.export import export_model

    result = export_model(folder, out, form=form, allow_code=allow_code)
    for note in result.notes:
        say(f"note: {note}", err=True)
    say(f"wrote {result.folder}: {', '.join(result.files)}\nload it: {result.loaded_by}")
