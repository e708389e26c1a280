"""The scan engine: chunked linear recurrences with no decay, a constant one or one that depends on
the data, for a head or for every channel; initial and last states, packing, gradients. Also the
gates of an additive recurrence, whose decay is a ratio of running sums, and scans without matrix
products: number by number, and with a state of its own for every channel.
"""

from attnspec.fast.engines.scan.additive import additive_gates, additive_scan
from attnspec.fast.engines.scan.api import (
    scan,
    scan_backward,
    segment_outputs,
    segment_states,
    step,
)
from attnspec.fast.engines.scan.configs import (
    CANDIDATES,
    ELEMENTWISE,
    SELECTIVE,
    LaneConfig,
    ScanConfig,
    use_config,
)
from attnspec.fast.engines.scan.elementwise import elementwise
from attnspec.fast.engines.scan.flows import DirectFlows
from attnspec.fast.engines.scan.running import running_dots
from attnspec.fast.engines.scan.selective import selective
from attnspec.fast.engines.scan.summary import read_summary, time_summary

__all__ = [
    "CANDIDATES",
    "ELEMENTWISE",
    "SELECTIVE",
    "DirectFlows",
    "LaneConfig",
    "ScanConfig",
    "additive_gates",
    "additive_scan",
    "elementwise",
    "read_summary",
    "running_dots",
    "scan",
    "scan_backward",
    "segment_outputs",
    "segment_states",
    "selective",
    "step",
    "time_summary",
    "use_config",
]
