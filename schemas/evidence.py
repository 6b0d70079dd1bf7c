"""Which channels of a layer speak for a target and which against it, in numbers and, where somebody named them, in words."""

from __future__ import annotations

from schemas.frozen import Frozen
from schemas.model import ChannelName


class Neuron(Frozen):
    """A channel and what it weighs."""

    channel: int
    importance: float
    """Mean gradient of the target over cells and tiles: logit/cell per unit of activation."""
    name: ChannelName | None = None

    def __str__(self) -> str:
        if self.name is None:
            return f"unit {self.channel}"
        return f"{self.name.name} (unit {self.channel}, score {self.name.score:g}, {self.name.provenance})"


class Evidence(Frozen):
    """The channels that weigh most for one target, strongest first."""

    target: str
    tiles: int
    """Tiles that the mean is over: those that score the target highest."""
    supports: tuple[Neuron, ...]
    opposes: tuple[Neuron, ...]

    @property
    def lines(self) -> tuple[str, str]:
        """For and against, to read."""
        return (
            f"evidence for {self.target}: {_listed(self.supports)}",
            f"evidence against {self.target} (their absence would help): {_listed(self.opposes)}",
        )


def _listed(neurons: tuple[Neuron, ...]) -> str:
    return "; ".join(f"{n} {n.importance:+.3g}" for n in neurons) or "none"
