"""How the pictures look: matplotlib figures that belong to no global state.

Colours are Okabe and Ito's, told apart with any colour vision (https://jfly.uni-koeln.de/color/). The LCSC model is
always blue and heavy, the best baseline orange where there are but two.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lcsc.core.words import IMAGES, words_of
from lcsc.report.tables import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lcsc.report.run import Run

P = ParamSpec("P")

BLUE, ORANGE, GREEN, INK, FAINT, GRID = "#0072B2", "#D55E00", "#009E73", "#1f2328", "#6e7781", "#e4e7eb"
FAMILY_COLORS = {
    "last": "#8c8c8c",
    "best_single": "#56B4E9",
    "ema": ORANGE,
    "power_ema": "#E69F00",
    "uniform": GREEN,
    "wsm": "#CC79A7",
}
#: of layer groups, in their order
GROUP_COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#8c8c8c")
STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a `$` in a name is a dollar
    "text.usetex": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}
WIDTH = 9.0  # inches: 900 CSS pixels at 100 to the inch
DPI = 200  # pixels saved, for screens with two device pixels to one


class Picture(Figure):
    """A figure that any notebook shows, with or without a matplotlib magic."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure) -> bytes:
    """The figure as a PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw with our style whatever the user's matplotlibrc says."""

    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped


def new_figure(height: float, title: str) -> Picture:
    """An empty figure of our width with a heading; height in inches."""
    figure = Picture(figsize=(WIDTH, height), dpi=100)
    FigureCanvasAgg(figure)
    figure.text(0.02, 1 - 0.12 / height, title, fontsize=13, weight="bold", va="top")
    return figure


def subtitle(figure: Figure, text: str) -> None:
    """A grey line under the heading."""
    figure.text(0.02, 1 - 0.39 / figure.get_figheight(), text, fontsize=9.5, color=FAINT, va="top")


def empty(figure: Figure, ax: Axes, text: str) -> Figure:
    """Say in the middle of the figure why it shows nothing."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", color=FAINT)
    return figure


def circumstances(run: Run) -> str:
    """What a picture taken out of its report must still say."""
    parts = [short(run.name, 20)]
    evaluator = (run.info.get("fingerprints") or {}).get("evaluator") or {}
    if run.info.get("nfe") and words_of(evaluator) is IMAGES:
        parts.append(f"{run.info['nfe']} NFE")
    if not run.finished:
        parts.append("unfinished")
    return " · ".join(parts)


def short(text: str, length: int) -> str:
    """At most `length` printable characters."""
    text = printable(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def darker(color: str) -> tuple[float, ...]:
    """Readable as text on white."""
    return tuple(0.8 * part for part in to_rgb(color))
