"""How numbers are written in what people read."""

from __future__ import annotations


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 8] -> "0-2, 8". numbers: ascending."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
