"""The scan engine: chunked linear recurrences with no decay, a constant one or one that depends on
the data, for a head or for every channel; initial and last states, packing, gradients.
"""

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
    "scan",
    "scan_backward",
    "segment_outputs",
    "segment_states",
    "step",
    "use_config",
]
