"""Pictures without a window and without global state of matplotlib; names are drawn as they are."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

_DPI = 120
_MAX_CHARACTERS = 24
_FONTS = ("DejaVu Sans", "Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Noto Sans Arabic")
"""For names in other scripts; those that are installed are tried in turn."""


def write_picture(path: Path, draw: Callable[[], Figure]) -> None:
    """Write what a function draws as PNG."""
    with _plain_text():
        figure = draw()
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=_DPI, bbox_inches="tight")


def render_svg(draw: Callable[[], Figure]) -> str:
    """Return what a function draws as an ``<svg>`` element, its text as text, the same in every call."""
    with _plain_text(), mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tuner"}):
        file = io.StringIO()
        draw().savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    return file.getvalue()[file.getvalue().index("<svg") :]


@contextmanager
def _plain_text() -> Iterator[None]:
    """Take nothing in a text for markup, and draw what no font has as a box."""
    fonts = [font for font in _FONTS if font in fontManager.get_font_names()]
    with (
        warnings.catch_warnings(),
        mpl.rc_context({"text.usetex": False, "text.parse_math": False, "font.family": fonts}),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def shorten_name(name: str) -> str:
    """Return a name on one line, cut in the middle so that numbered names stay apart."""
    name = "".join(character if character.isprintable() else " " for character in name)
    half = _MAX_CHARACTERS // 2
    return name if len(name) <= _MAX_CHARACTERS else f"{name[:half]}…{name[1 - half :]}"
