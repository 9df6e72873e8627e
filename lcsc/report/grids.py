"""Sample grids: what the scores look like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from lcsc.report.style import BLUE, FAINT, INK, circumstances, new_figure, short, styled, subtitle
from lcsc.report.tables import display_label, number, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lcsc.report.run import Run


@styled
def samples(run: Run, images: Mapping[str, np.ndarray]) -> Figure:
    """Grids of 8 x 8 images side by side: real, last checkpoint, best EMA, the best baseline where it is another, LCSC.

    All but the real ones are made from the same noise.

    Args:
        images: float arrays (N, C, H, W) in [-1, 1] by the names of samples.npz; one that is absent is left out.
    """
    titles = _sample_titles(run)
    shown = [key for key in titles if key in images]
    figure = new_figure(3.2, "Samples from the same noise")
    subtitle(figure, f"first 64 images of the report seeds, none chosen · {circumstances(run)}")
    wide = 0.97 / max(len(shown), 1)
    size, length = (9.5, 28) if len(shown) < 5 else (7.5, 27)  # five headings are narrower
    for column, key in enumerate(shown):
        ax = figure.add_axes((0.02 + column * wide, 0.03, wide - 0.02, 0.655))
        grid_HWC = tile(images[key])
        ax.imshow(grid_HWC, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ax.set_axis_off()
        head, score = titles[key]
        color = BLUE if key == "best" else INK
        ax.set_title(short(head, length), fontsize=size, loc="left", pad=17, weight="bold", color=color)
        ax.text(0, 1.02, score, transform=ax.transAxes, fontsize=9, color=FAINT, va="bottom")
    return figure


def tile(images_NCHW: np.ndarray, rows: int = 8, pixels: int = 640) -> np.ndarray:
    """Up to rows x rows images as one picture in [0, 1], (H, W) grey or (H, W, 3); pixels are repeated, not blurred."""
    images = np.clip((images_NCHW[: rows * rows].astype(np.float64) + 1) / 2, 0, 1)
    count, channels, height, width = images.shape
    images = images[:, :3] if channels >= 3 else images[:, :1]
    factor = max(1, pixels // (rows * max(height, width)))
    images = images.repeat(factor, axis=2).repeat(factor, axis=3)
    gap = max(1, images.shape[-1] // 12)
    canvas = np.ones((rows * (images.shape[2] + gap) - gap, rows * (images.shape[3] + gap) - gap, images.shape[1]))
    for index in range(count):
        top, left = (index // rows) * (images.shape[2] + gap), (index % rows) * (images.shape[3] + gap)
        canvas[top : top + images.shape[2], left : left + images.shape[3]] = images[index].transpose(1, 2, 0)
    return canvas[..., 0] if canvas.shape[-1] == 1 else canvas


def _sample_titles(run: Run) -> dict[str, tuple[str, str]]:
    """Heading and score of each grid, in the order of display."""
    metric = printable(str(run.info["metric"]))
    report = (run.summary or {}).get("report") or {}
    baselines = report.get("baselines") or {}
    families = dict.fromkeys(("last", "ema", report.get("best_baseline")))

    def score(row: dict[str, Any] | None) -> str:
        return f"{metric} {number(row['value'], row.get('se'))}" if row else ""

    def title(family: str) -> tuple[str, str]:
        row = baselines.get(family)
        return printable(display_label(family, row["label"] if row else "")), score(row)

    floor = "" if run.floor is None else f"{metric} {number(run.floor)} (floor)"
    return {
        "real": ("real", floor),
        **{family: title(family) for family in families if family},
        "best": ("LCSC", score(report.get("best"))),
    }
