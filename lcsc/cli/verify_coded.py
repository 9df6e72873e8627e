"""`lcsc verify` of a coded bank: every number of every checkpoint decoded and compared with its digest."""

from __future__ import annotations

from pathlib import Path

from lcsc.bank import CheckpointBank
from lcsc.cli.passes import passing
from lcsc.cli.sizes import size_text
from lcsc.codec.chain import Chain
from lcsc.core.errors import BankError


def verify_coded(path: Path, original: Path | None = None) -> str:
    """A sentence about a coded bank that is whole.

    Args:
        path: the folder.
        original: the bank that it was made of; its contents are compared too.

    Raises:
        BankError: the first damage, or the first checkpoint that is not the original's.
    """
    chain = Chain(path)
    with passing("verify", unit="checkpoints") as progress:
        for done, _ in enumerate(chain.walk(), 1):
            progress(done, len(chain.steps))
    said = ""
    if original is not None:
        mine = {p["step"]: p["content"] for p in CheckpointBank.open(path).parents}
        bank = CheckpointBank.open(original, storage="streamed")
        bank.load()
        theirs = {p["step"]: p["content"] for p in bank.parents}
        for step, content in mine.items():
            if theirs.get(step) != content:
                lossy = chain.header(step).get("lossy")
                why = "it was coded with loss" if lossy else "one of the two was changed"
                raise BankError(
                    f"step {step} of `{path}` does not hold the numbers of `{original}`: {why}. Compare it with the "
                    "bank that it was packed from."
                )
        said = f", the same bits as {original}"
    nbytes = sum(file.nbytes for file in chain.files.values())
    anchors = sum(chain.header(step)["reference"] is None for step in chain.steps)
    return (
        f"verified: {path} ({len(chain.steps)} coded checkpoints, {anchors} of them anchors, {size_text(nbytes)}, "
        f"every number as it was written{said})"
    )
