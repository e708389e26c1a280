"""The scan engine: chunked linear recurrences with no decay, a constant one or one that depends on
the data, for a head or for every channel; initial and last states, packing, gradients. Also the
gates of an additive recurrence, whose decay is a ratio of running sums.
"""

from attnspec.fast.engines.scan.additive import additive_gates, time_summary
from attnspec.fast.engines.scan.api import (
    scan,
    scan_backward,
    segment_outputs,
    segment_states,
    step,
)
from attnspec.fast.engines.scan.configs import CANDIDATES, ScanConfig, use_config

__all__ = [
    "CANDIDATES",
    "ScanConfig",
    "additive_gates",
    "scan",
    "scan_backward",
    "segment_outputs",
    "segment_states",
    "step",
    "time_summary",
    "use_config",
]
