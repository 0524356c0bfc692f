"""The command group, and how errors become exit codes. Heavy imports wait inside the commands."""

import errno
import gc
import os
import sys
from importlib.metadata import version

import click

from tuner.cli.cache import cache
from tuner.cli.results import backup, best, delete, list_, report, show, status, trials
from tuner.cli.searching import check, confirm, dashboard, init, run
from tuner.cli.using import evaluate, export, predict, train, verify
from tuner.errors import EXIT_SIGINT, StorageError, TunerError
from tuner.spec.printable import as_printable

_EXIT_BROKEN_PIPE = 141
_EXIT_DECLINED = 2
_USERS_ERRNOS = {
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
}
"""What a path or a disk of the user's can cause anywhere; a file that is not there, say, may as well be a bug."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("tuner"), prog_name="tuner")
def cli() -> None:
    """Find the best fine-tuned image classifier for the hours you give.

    \b
    Example:
      tuner init photos/            look at a folder of images, write photos.toml
      tuner check photos.toml       problems, or the plan
      tuner run photos.toml         search; stop it any time, the same command goes on
      tuner train photos --out model/
      tuner predict model/ *.jpg
    """


for command in (
    *(init, check, run, confirm, list_, status, trials, show, best, train, evaluate, verify, predict, export),
    *(report, delete, backup, dashboard, cache),
):
    cli.add_command(command)


def main() -> None:
    """Run the command line and exit with its code."""
    gc.set_threshold(10_000, 10, 10)  # from 700: loading torch and timm took a fifth less time
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run one command; return its exit code. A user's mistake is one clear line on stderr, a bug a traceback."""
    try:
        code = _call(arguments)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except TunerError as error:
        for line in str(error).splitlines():
            click.echo(as_printable(line if line.startswith(" ") else f"error: {line}"), err=True)
        return error.exit_code
    except click.Abort as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            click.echo("stopped", err=True)
            return EXIT_SIGINT
        click.echo("nothing was changed", err=True)  # "no" to a question, or nobody there to answer it
        return _EXIT_DECLINED
    except BrokenPipeError:  # `tuner trials | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    return code if isinstance(code, int) else 0


def _call(arguments: list[str]) -> object:
    """Run one command; return what it returned.

    Raises:
        StorageError: Also for what the user's path or disk makes fail anywhere.
    """
    try:
        return cli.main(arguments, prog_name="tuner", standalone_mode=False)
    except OSError as error:
        if error.filename is None or error.errno not in _USERS_ERRNOS:
            raise
        place = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        what = f"must be a place that can be read and written, got: {error.strerror}"
        raise StorageError(f"{as_printable(place)}: {what}") from error
