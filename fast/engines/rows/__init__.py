"""The rows engine: what surrounds a linear attention token by token, each in one pass over memory.

`gated_norm` merges heads, divides by the root mean square of the whole row and multiplies by a
gate; `lift` activates queries and keys and turns positions into phases; `turn` rotates queries and
keys to their positions; `positive` maps them to positive features.
"""

from attnspec.fast.engines.rows.configs import CANDIDATES, RowsConfig, use_config
from attnspec.fast.engines.rows.features import positive
from attnspec.fast.engines.rows.op import gated_norm, lift
from attnspec.fast.engines.rows.turning import turn

__all__ = ["CANDIDATES", "RowsConfig", "gated_norm", "lift", "positive", "turn", "use_config"]
