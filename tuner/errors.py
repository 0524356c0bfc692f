"""Every error that a user can cause, with the exit code of the command that meets it.

::

    TunerError
    ├── SpecError         3  the study file cannot be used
    ├── StudyError        4  the stored study does not fit the request
    ├── DataError         5  the images or labels cannot be used
    ├── ModelError        6  the backbone or its weights cannot be used
    ├── ExportError       7  there is nothing to export
    ├── StorageError      8  the database cannot be read or written
    ├── DeviceError       9  the device does not exist or is busy
    └── SearchError      10  no trial completed, or too many failed in a row

Exit code 1 is a bug and keeps its traceback, 2 is click's usage error, 11 is "done, but some files were skipped", 12 is
"the model card does not hold", 130 is Ctrl-C and 143 is SIGTERM. A message reads
``<where>: <what must hold>, got <value>; <what to do>``.
"""

from collections.abc import Iterable

EXIT_SKIPPED = 11
EXIT_NOT_VERIFIED = 12
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class TunerError(Exception):
    """Base of every error that a user can cause; its text is written for the user."""

    exit_code = 1


class SpecError(TunerError):
    """The study file cannot be used. Holds all problems of the file, one line each."""

    exit_code = 3

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class StudyError(TunerError):
    """The stored study does not fit the request."""

    exit_code = 4


class DataError(TunerError):
    """The images or labels cannot be used."""

    exit_code = 5


class ModelError(TunerError):
    """The backbone or its weights cannot be used."""

    exit_code = 6


class OwnCodeError(ModelError):
    """The user's own function failed to make a backbone: a bug of theirs, where other weights and disks may recover."""


class ExportError(TunerError):
    """There is nothing to export."""

    exit_code = 7


class StorageError(TunerError):
    """The database cannot be read or written."""

    exit_code = 8


class StorageBusyError(StorageError):
    """The database cannot be used now, but may be soon: it is locked, or its disk is full. A run tries again."""


class DeviceError(TunerError):
    """The device does not exist or is busy."""

    exit_code = 9


class SearchError(TunerError):
    """No trial completed, or too many failed in a row."""

    exit_code = 10


ERRORS_BY_NAME: dict[str, type[TunerError]] = {
    error.__name__: error
    for error in (
        SpecError,
        StudyError,
        DataError,
        ModelError,
        OwnCodeError,
        ExportError,
        StorageError,
        DeviceError,
        SearchError,
    )
}
"""Lets an error cross the pipe from a worker by its name."""


def first_line(error: Exception) -> str:
    """Return what an error says in one line, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
