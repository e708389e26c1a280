"""The spec: one chapter per mechanism, written in plain NumPy.

Start with `attnspec.reference.dense.attention`, the chapter the others depart from, and with
`attnspec.reference.conventions`, the rulebook they cite as K1..K14.
"""

from attnspec.reference.spec import (
    Coverage,
    Mechanism,
    Operation,
    Paper,
    find_mechanism,
    find_operation,
    mechanisms,
)

__all__ = [
    "Coverage",
    "Mechanism",
    "Operation",
    "Paper",
    "find_mechanism",
    "find_operation",
    "mechanisms",
]
