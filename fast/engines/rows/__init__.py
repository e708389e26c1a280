"""The rows engine: what surrounds a linear attention token by token, each in one pass over memory.

`gated_norm` merges heads, divides by the root mean square of the whole row and multiplies by a
gate; `lift` activates queries and keys and turns positions into phases; `turn` rotates queries and
keys to their positions; `positive` maps them to positive features; `silu_gate` opens a feed-forward
network; `join_normed` and `join_read` lay the tokens of two arrays together.
"""

from attnspec.fast.engines.rows.configs import CANDIDATES, RowsConfig, use_config
from attnspec.fast.engines.rows.features import positive
from attnspec.fast.engines.rows.gating import silu_gate
from attnspec.fast.engines.rows.joined import join_normed, join_read
from attnspec.fast.engines.rows.op import gated_norm, lift
from attnspec.fast.engines.rows.turning import turn

__all__ = [
    "CANDIDATES",
    "RowsConfig",
    "gated_norm",
    "join_normed",
    "join_read",
    "lift",
    "positive",
    "silu_gate",
    "turn",
    "use_config",
]
