"""How a winner's way lies to the directions that matter: bars of slope or spread, dots of the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lcsc.report.style import BLUE, circumstances, empty, new_figure, styled, subtitle

if TYPE_CHECKING:
    from lcsc.report.run import Run

LOWEST = 1e-6  # smaller shares are drawn at the lower edge
BAR, FLAT_BAR = "#9aa4af", "#d9dde2"


@styled
def geometry(run: Run) -> Figure:
    """Share of the squared slope (of a descent) or spread (else) along each direction, and of the winner's way.

    Flat directions are pale. Logarithmic, because shares span decades; the numbers are `Run.directions`.
    """
    frame = run.directions()
    slope = "slope" in frame
    # a winner that combines no checkpoints has no way along them
    drawn_way = not frame.empty and bool(np.isfinite(frame["way"].to_numpy()).all())
    heading = "Where the score changes" if slope else "The checkpoints' directions"
    figure = new_figure(4.0, heading + (", and where the winner went" if drawn_way else ""))
    ax = figure.add_axes((0.105, 0.135, 0.865, 0.6))
    if frame.empty:
        return empty(figure, ax, "known when the search is finished")
    number, share, way = (frame[name].to_numpy() for name in ("direction", "slope" if slope else "spread", "way"))
    flat = frame["flat"].to_numpy()
    drawn = np.concatenate([share, way[np.isfinite(way)]])
    low = max(drawn[drawn > 0].min(initial=1.0) / 2, LOWEST)
    ax.set_yscale("log")
    ax.set_ylim(low, 1.6)
    ax.grid(axis="y")
    what = "squared slope of the score" if slope else "spread of the checkpoints"
    name = "under 1 % of the mean" if slope else "shorter than 1/1000 of the longest"
    for mask, color, label in ((~flat, BAR, what), (flat, FLAT_BAR, f"flat: {name}")):
        if mask.any():
            # from the edge: on a logarithmic axis a bar has no zero to stand on
            tall = np.maximum(share[mask], low) - low
            ax.bar(number[mask], tall, bottom=low, width=0.78, color=color, label=label)
    if drawn_way:
        label = "the winner's squared way from the best baseline"
        ax.plot(number, np.maximum(way, low), "o", color=BLUE, markersize=4.6, label=label, clip_on=False, zorder=4)
    ax.set_xlim(0.4, len(frame) + 0.6)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=14))
    ax.yaxis.set_major_locator(LogLocator(10))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(f"direction, {'steepest' if slope else 'longest'} first")
    ax.set_ylabel("share (log scale)")
    where = {"loc": "upper right", "bbox_to_anchor": (0.975, 0.835), "borderaxespad": 0.0}
    figure.legend(**where, ncols=3, frameon=False, fontsize=9, handlelength=1.2, columnspacing=1.4)
    subtitle(figure, f"{circumstances(run)} · {_sentence(run, slope)}")
    return figure


def _sentence(run: Run, slope: bool) -> str:
    """The picture's one message."""
    if not slope:
        bank = run.geometry["bank"]
        return f"effective rank of the checkpoints {bank['effective_rank']:.1f} of {bank['num_directions']}"
    found = run.geometry["slope"]
    text = f"{found['num_carrying']} of {found['num_directions']} directions carry 99 % of the squared slope"
    share = found.get("way_flat")
    return text if share is None else f"{text} · {100 * share:.2g} % of the way lies along the flat ones"
