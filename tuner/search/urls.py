"""Storage URLs as they may be shown and stored: without what is secret in them, however wrong they are."""

import re

_FILE = re.compile(r"sqlite:///[^?]*")
"""Three slashes begin a path, in which "@" is a character like others."""
_PLAIN_PATH = re.compile(r"[\w./-]+\.(db|sqlite3?)")
"""Given in place of a URL again and again."""
_SCHEME = re.compile(r"[A-Za-z][\w+.-]*://", re.ASCII)


def is_file_url(url: str) -> bool:
    """Whether a URL is an SQLite file's path and nothing else, so that it holds no secret."""
    return _FILE.fullmatch(url) is not None


def mask_secrets(url: str) -> str:
    """Return an SQLite file's URL or path without its options, and of anything else its scheme alone.

    Where a password begins and ends in a wrong URL is anyone's guess, so nothing of it is shown.
    """
    if is_file_url(url) or _PLAIN_PATH.fullmatch(url):
        return url
    if file := _FILE.match(url):
        return f"{file.group()}?***"
    scheme = _SCHEME.match(url)
    return f"{scheme.group() if scheme else ''}***"
