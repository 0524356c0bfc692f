"""Storage URLs as they may be shown: without what is secret in them, however wrong they are."""

import re

# Three slashes begin a path, in which "@" is a character like others.
_LOGIN = re.compile(r"^(?!sqlite:///)((?:[\w+.-]*:)?(?://)?).*@", re.DOTALL)
_OPTION = re.compile(r"([?&][^=&]*)=[^&]*")


def mask_secrets(url: str) -> str:
    """Return a URL with asterisks for its user and password, and for the values of its options."""
    return _OPTION.sub(r"\1=***", _LOGIN.sub(r"\1***@", url))
