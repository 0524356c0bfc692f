"""Commands that turn a search into a model in use: train, predict, export."""

import json
from pathlib import Path

import click

from tuner.cli.options import json_option, say, storage_option
from tuner.errors import EXIT_SKIPPED
from tuner.spec.printable import as_printable


@click.command()
@click.argument("study")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Model folder to write.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@click.option("--allow-code", is_flag=True, help="Let a backbone that is a function of yours be imported.")
@storage_option
def train(study: str, out: Path, device: str, allow_code: bool, storage: str | None) -> None:
    """Retrain the best recipe on train + val, and look at the test split once.

    \b
    Example:
      tuner train digits --out model/
    """
    from tuner.production.retrain import train_best
    from tuner.production.train_result import describe_result

    result = train_best(study, out, storage=storage, device=device, allow_code=allow_code, announce=say)
    say(describe_result(result))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.argument("images", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@click.option("--allow-code", is_flag=True, help="Let a backbone that is a function of yours be imported.")
@json_option
def predict(folder: Path, images: tuple[Path, ...], device: str, allow_code: bool, as_json: bool) -> int:
    """Classify images, or all images of folders, with a model folder.

    Files that cannot be read are named on stderr and left out; the exit code is then 11.

    \b
    Example:
      tuner predict model/ photo.jpg more_photos/
    """
    from tuner.production.predictor import find_images, load

    predictor = load(folder, device=device, allow_code=allow_code)
    predictions = predictor.predict(find_images(images))
    done = [prediction for prediction in predictions if prediction.error is None]
    for prediction in predictions:
        if prediction.error is not None:
            click.echo(as_printable(f"skipped {prediction.path}: {prediction.error}"), err=True)
    if as_json:
        click.echo(json.dumps([prediction.to_json() for prediction in predictions], indent=2))
    else:
        for prediction in done:
            path, label = as_printable(prediction.path), as_printable(prediction.label)
            click.echo(f"{path}\t{label}\t{prediction.probability:.4f}")
    return EXIT_SKIPPED if len(done) < len(predictions) else 0


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
