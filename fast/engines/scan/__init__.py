"""The scan engine: chunked linear recurrences with no decay, a constant one or one that depends on
the data, for a head or for every channel; initial and last states, packing, gradients. Also the
gates of an additive recurrence, whose decay is a ratio of running sums; a memory of unit keys that
is read before it is written; and scans without matrix products: number by number, with a state of
its own for every channel, and a moving average with what agrees with it.
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
    GATED,
    MEMORY,
    SELECTIVE,
    LaneConfig,
    MemoryConfig,
    ScanConfig,
    use_config,
)
from attnspec.fast.engines.scan.elementwise import elementwise
from attnspec.fast.engines.scan.flows import DirectFlows, packed_flows
from attnspec.fast.engines.scan.gated import forget_gate, gated_scan
from attnspec.fast.engines.scan.hebbian import constant_decay, hebbian
from attnspec.fast.engines.scan.running import running_dots
from attnspec.fast.engines.scan.selective import selective
from attnspec.fast.engines.scan.summary import read_summary, time_summary
from attnspec.fast.engines.scan.trace import FLOOR, trace

__all__ = [
    "CANDIDATES",
    "ELEMENTWISE",
    "FLOOR",
    "GATED",
    "MEMORY",
    "SELECTIVE",
    "DirectFlows",
    "LaneConfig",
    "MemoryConfig",
    "ScanConfig",
    "additive_gates",
    "additive_scan",
    "constant_decay",
    "elementwise",
    "forget_gate",
    "gated_scan",
    "hebbian",
    "packed_flows",
    "read_summary",
    "running_dots",
    "scan",
    "scan_backward",
    "segment_outputs",
    "segment_states",
    "selective",
    "step",
    "time_summary",
    "trace",
    "use_config",
]
