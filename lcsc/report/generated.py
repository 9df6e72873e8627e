"""What is to be said of generated weights: what was asked for, and how far they are from what was seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lcsc.search.frames import Record

if TYPE_CHECKING:
    from lcsc.report.run import Run


def generated_notes(run: Run) -> list[str]:
    """One sentence for the winner and for each baseline, of searches with operator `generate_weights`; else none."""
    return [_sentence(record) for record in run.reports if "proposal" in record]


def _sentence(record: Record) -> str:
    near, moved = record["nearest"], record["moved"]
    who = "The winner" if record["who"] == "best" else f"`{record['label']}`"
    way = f"from {record['prompted_metric']} {record['start_metric']:.4g}"
    if record["proposal"] == "generated":
        goals = ", then ".join(f"{goal:.4g}" for goal in record["goals"])
        text = f"{who} was generated {way}, asked for {goals}"
        if record["extrapolation"]:
            text += " (beyond what the generator has seen: an extrapolation)"
    else:
        text = f"{who} is not generated ({record['proposal']})"
    if combined := record.get("combined"):
        total = sum(combined.values())
        text += f" and combined with {len(combined)} checkpoints: {1 - total:.3g} of it and {total:.3g} of them in sum"
    return (
        f"{text}; it is {near['distance']:.4g} from the nearest training checkpoint ({near['run']}, step "
        f"{near['step']}, hidden units matched) and {moved:.4g} from the start."
    )
