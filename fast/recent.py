"""What has been worked out for recent kinds of calls, such as plans and launches."""

from __future__ import annotations

from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

MOST_KINDS = 1024
"""Kinds of calls that an engine remembers."""


class Recent(dict[Key, Value]):
    """A dict that forgets everything rather than hold more than `most` entries."""

    def __init__(self, most: int = MOST_KINDS) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, key: Key, value: Value) -> None:
        if len(self) >= self.most and key not in self:
            self.clear()
        super().__setitem__(key, value)
