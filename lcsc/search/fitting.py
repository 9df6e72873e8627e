"""Whether trials can fit the noise that they are scored on."""

from __future__ import annotations

from lcsc.core.words import words_of
from lcsc.objectives.base import Objective
from lcsc.searchers.base import Proposal, Searcher

#: Optimism of scores that a search has seen grows like coefficients over images; below this many images for each
#: coefficient it is worth a word (docs/honest_numbers.md).
IMAGES_PER_COEFFICIENT = 100


def fitting_note(
    searcher: Searcher, objective: Objective, proposal: Proposal, num_images: int, num_coefficients: int
) -> str | None:
    """A sentence where trials like `proposal` return to the noise of too few images; None where all is well.

    New noise for every trial cannot be fitted, and an objective without a data set (a user's own) says itself what an
    image is.

    Args:
        searcher: noise that it rotates counts with all its blocks, where it has a field `noise` that says so.
        objective: what scores.
        proposal: a trial to come.
        num_images: images of a trial that does not say so itself.
        num_coefficients: size of what is searched.
    """
    num, need = proposal.num_images or num_images, IMAGES_PER_COEFFICIENT * num_coefficients
    rotating = proposal.block is not None and getattr(searcher, "noise", None) == "rotating"
    if not hasattr(objective, "dataset") or (proposal.block is not None and not rotating):
        return None
    num *= getattr(searcher, "num_blocks", 1) if rotating else 1
    if num >= need:
        return None
    advice = "raise `search.num_images`" + (" or `searcher.num_blocks`" if rotating else "")
    items = words_of(objective.circumstances()).many
    return (
        f"note: trials share the noise of {num:,} {items} for {num_coefficients} coefficients, so their scores flatter "
        f"(the report's do not); {advice} until there are {need:,}, or descend on fresh noise (`searcher=gradient`) "
        "where there is a derivative"
    )
