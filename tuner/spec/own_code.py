"""Backbones that are a user's own function: code, which a stored study or a model folder alone must not run."""

from typing import Literal

from tuner.errors import ModelError

SMALL_CNN = "tuner:small_cnn"


def is_users_code(backbone: str) -> bool:
    """Whether a backbone's name is that of a user's function, ``package.module:function``."""
    return ":" in backbone and backbone != SMALL_CNN


def check_code(backbone: str, *, allow_code: bool, where: str, kind: Literal["study", "folder"]) -> None:
    """Refuse a backbone that is a user's function, unless it is allowed.

    Args:
        backbone: Its name.
        allow_code: Whether the user trusts it.
        where: The study or folder that names it, for the message.
        kind: Which of the two.

    Raises:
        ModelError: If it is not allowed.
    """
    if is_users_code(backbone) and not allow_code:
        raise ModelError(
            f"{where}: must have a backbone of timm or tuner, got the function {backbone!r}; "
            f"allow code (--allow-code) only if you trust the {kind} and that function"
        )
