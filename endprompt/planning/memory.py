"""A memory prediction: parts of each phase of a step, and the phase that needs most. Sizes in 10^9 bytes of one GPU."""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Memory:
    """phases: for each phase of a step, its parts in bytes. What stays from step to step is in each of them.

    host: bytes of pinned host memory a GPU's rank holds (offloading), 0 otherwise.
    """

    phases: dict[str, dict[str, float]]
    host: float = 0.0

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts_gb(self) -> dict[str, float]:
        """Parts at the peak, in GB."""
        return {part: size / GB for part, size in self.phases[self.peak_phase].items() if size}

    @property
    def total_gb(self) -> float:
        return sum(self.parts_gb.values())

    @property
    def host_gb(self) -> float:
        return self.host / GB
