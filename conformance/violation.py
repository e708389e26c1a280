"""What a law raises: one broken promise, with the numbers that show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Violation(Exception):
    """A kernel broke a law.

    `stage` is the output or step concerned; for a number, `coordinate`, `expected`, `got`, `error`
    and `budget` describe the worst entry (`error` and `budget` of its whole row, as root mean
    squares).
    """

    stage: str
    message: str
    coordinate: tuple[int, ...] | None = None
    expected: float | None = None
    got: float | None = None
    error: float | None = None
    budget: float | None = None

    def __str__(self) -> str:
        text = f"{self.stage}: {self.message}"
        if self.coordinate is not None:
            text += f" at {list(self.coordinate)}"
        if self.expected is not None:
            text += f", expected {self.expected:.6g}, got {self.got:.6g}"
        if self.budget is not None:
            text += f", row error {self.error:.3g}, budget {self.budget:.3g}"
        return text
