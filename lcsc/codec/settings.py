"""How checkpoints are coded, as a person says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from lcsc.codec.lossy import Pruning
from lcsc.core.errors import ConfigError

MODES = ("lossless", "lossy")
#: what codes the symbols of a lossy chain
CODERS = ("counts", "neural")
#: fewest numbers of a tensor that is quantised; smaller ones are kept without loss
SMALLEST = 1024


@dataclass(frozen=True)
class CodecSettings:
    """How a chain of checkpoints is coded.

    Args:
        mode: `lossless`, or `lossy` for weights and moments in float32.
        anchor_every: checkpoints from one that needs no other to the next; the first is one.
        bits_w, bits_m, bits_v: of a symbol of a weight's difference, a first and a second moment: 2 to 8, or 32 for no
            loss. `bits_w` may be 0, where weights stay those of the anchor.
        layers: other `bits_w` by pattern of the tensor's name, such as `{"*.embed*": 6}`; the first that fits counts.
        tau: differences of weights up to `tau` times their median size in a tensor are dropped (0 to 10).
        beta: first moments up to `beta` times their mean size are dropped (0 to 10).
        joint: drop moments where the weight's difference or the first moment is dropped, as ExCP does.
        coder: of symbols: `counts`, or `neural`, a network that is smaller and slower (`lcsc.codec.neural`).
    """

    mode: str = "lossless"
    anchor_every: int = 10
    bits_w: int = 4
    bits_m: int = 4
    bits_v: int = 4
    layers: Mapping[str, int] = field(default_factory=dict)
    tau: float = 0.0
    beta: float = 0.0
    joint: bool = True
    coder: str = "counts"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"`codec` is `{self.mode}`; it must be one of {', '.join(MODES)}.")
        if self.coder not in CODERS:
            raise ConfigError(f"`coder` is `{self.coder}`; it must be one of {', '.join(CODERS)}.")
        if self.coder != "counts" and self.mode == "lossless":
            raise ConfigError(
                f"`coder` is `{self.coder}` and `codec` is `lossless`, which makes no symbols for it to code. Leave it "
                "out, or use codec=lossy."
            )
        if type(self.anchor_every) is not int or self.anchor_every < 1:
            raise ConfigError(f"`anchor_every` is {self.anchor_every}; it must be a whole number of at least 1.")
        widths = {"bits_w": self.bits_w, "bits_m": self.bits_m, "bits_v": self.bits_v, **self.layers}
        for name, bits in widths.items():
            zero = name not in ("bits_m", "bits_v")
            if type(bits) is not int or not (2 <= bits <= 8 or bits == 32 or (zero and bits == 0)):
                also = " or 0, which drops it" if zero else ""
                raise ConfigError(f"`{name}` is {bits}; it must be 2 to 8, 32 for none of it lost{also}.")
        for name, value in (("tau", self.tau), ("beta", self.beta)):
            if not 0 <= value <= 10:
                raise ConfigError(f"`{name}` is {value}; it must lie between 0 and 10.")

    @property
    def pruning(self) -> Pruning:
        """What is dropped."""
        return Pruning(self.tau, self.beta, self.joint)

    def bits_of(self, name: str, size: int) -> dict[str, int]:
        """Bits by plane of a tensor of float32 with `size` numbers; planes without loss are left out."""
        if self.mode == "lossless" or size < SMALLEST:
            return {}
        own = next((bits for pattern, bits in self.layers.items() if fnmatchcase(name, pattern)), self.bits_w)
        found = {"w": own, "m": self.bits_m, "v": self.bits_v}
        return {plane: bits for plane, bits in found.items() if bits != 32}
