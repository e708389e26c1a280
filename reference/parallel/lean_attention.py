r"""Lean attention: one softmax attention shared out evenly among the workers of a device.

At decode there is one query a head and a long context, so a worker per head leaves a device idle,
and a fixed number of pieces per head leaves it unevenly loaded. A softmax can be put together from
any contiguous pieces of its keys, because partial results merge associatively. All key tiles of all
heads and sequences are therefore laid on one line, the line is cut into equal stretches, one for
each resident worker, and the pieces of an output are merged within the same launch. The result is
exact: only the schedule is new.

Definition
----------
"The authors" are their kernel in ONNX Runtime, "the port" is an independent one in Triton
(ROCm/aiter).

S1. **Triple.** For a set J of keys with scores :math:`x_j = \tau\, q \cdot k_j`, the scale
:math:`\tau` being :math:`1/\sqrt d` unless it is given (K2): :math:`m = \max_j x_j`, :math:`l =
\sum_j e^{x_j - m}`, :math:`o = \sum_j e^{x_j - m} v_j`, not divided by l. Changing the reference,
:math:`(m + c, l e^{-c}, o e^{-c})`, changes nothing, so l may be below 1. (Kernels work in base 2;
every number here is natural, K5.)

S2. **Merge.** :math:`m = \max(m_1, m_2)`, :math:`a_i = e^{m_i - m}`, or 0 where
:math:`m_i = -\infty`; :math:`l = a_1 l_1 + a_2 l_2`, :math:`o = a_1 o_1 + a_2 o_2`. Associative and
commutative, with the unit :math:`(-\infty, 0, 0)`. The result is :math:`o / l` with lse
:math:`m + \log l`; l = 0 gives output 0 and lse :math:`-\infty` (K4).

S3. **Tile.** N consecutive keys of one sequence and kv head; the last of a sequence may be partial
and is masked. The authors take N = 256 for d up to 64, 128 up to 128, 64 above; the port takes 64.

S4. **Output.** One for each kv head, sequence and block of M queries; the query heads of a group
are packed as rows of one block, so keys and values are read once. It has
:math:`n_u = \lceil c / N \rceil` tiles, where c is the length of the sequence, or under the causal
rule :math:`\min((i + 1) M, T_q) + len - T_q` for block i, kept within [0, len]. There query t sees
the keys up to :math:`len - T_q + t`, none where that is below 0, and the heads packed in a block
share their positions. The authors take M = 64, the port 128 or 16.

S5. **Line.** The tiles of all outputs in the order kv head, sequence, query block; W in all. Those
of output u begin at :math:`\sum_{u' < u} n_{u'}`.

S6. **Grid.** Of `slots` resident workers (2 a multiprocessor for the authors, 3 in the port), few
tiles (:math:`W \le 2\,slots` for the authors, :math:`W \le slots` in the port) employ
:math:`G = \min(\lceil W/2 \rceil, \lceil 32 W / \max n_u \rceil)`: two tiles a worker at least,
about 32 pieces an output at most. Otherwise all work, by the authors' rule at most 32 for each
output. Always :math:`1 \le G \le W`, and nothing is launched for W = 0. All G must be resident,
since some wait for others.

S7. **Shares.** :math:`T = \lceil W/G \rceil`; the first :math:`hi = W - (T-1) G` workers take T
tiles, the others T - 1. Worker g starts at :math:`g T`, or at :math:`hi\,T + (g - hi)(T - 1)` from
hi on.

S8. **Work.** A worker walks its stretch and makes one triple of each output it meets. It is *host*
of an output whose first tile it holds, *finishing* if it holds the last. A host that finishes
writes the result; one that does not waits for the workers g + 1, g + 2, ... up to the owner of the
last tile and merges their triples in this order. Any other worker stores its triple in scratch
slot g and raises flag g: at most one store a worker.

S9. **Bound.** An output of at most n tiles is split among at most
:math:`1 + \lfloor (n + T - 2)/T \rfloor` workers if G divides W, else
:math:`1 + \lfloor (n + T - 3)/(T - 1) \rfloor`.

S10. **Scratch.** G slots of rows (dv + 2) numbers. Flags are down before a launch, or carry its
number; here the slots live within one call.

S11. **Paired order** of the query blocks: 0, last, 1, last - 1, ..., so that under the causal rule
neighbours on the line have complementary sizes. (The port, whose order it is, wants M to be a
multiple of N; nothing here does.)

S12. **Lengths.** Keys beyond the length of a sequence are not read (K11). An output without tiles
has no host: its rows are written apart, as 0 with lse :math:`-\infty`.

Complexity
----------
That of dense attention. No worker has more than one tile above another's, and the extra traffic is
at most G triples, written and read once.

Paper and code
--------------
The authors' kernel and the port differ in tile size, in workers, in the threshold of S6 and in
packing the group: the port schedules each query head, and reads keys and values once for each. It
also wants whole tiles and no ragged causal batches, and its bound for S9 adds up the tiles of all
sequences. The paper promises any context length; the general form is defined here, with the
authors' packing and their order of merges, so that equal schedules give equal bits. That outputs
without tiles count in the cap of S6 is ours. Flags are plain stores that write through the caches,
where an atomic exchange would be portable.
"""

from __future__ import annotations

import math

import numpy as np

from attnspec.reference.conventions import check_array, check_attention_inputs
from attnspec.reference.parallel.lean_attention_schedule import (
    block_rows,
    grid_size,
    helpers,
    lean_schedule,
    line_order,
    segments,
    split_bound,
    tile_size,
    tiles_per_output,
)
from attnspec.reference.parallel.lean_attention_triples import Triple, finalize, merge, partial
from attnspec.reference.spec import HEADS, PATTERNS, PHASES, Coverage, Mechanism, Operation, Paper


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    lengths: np.ndarray,
    N: int,
    G: int,
    scale: float | None = None,
    causal: bool = False,
    M: int | None = None,
    order: str = "natural",
) -> tuple[np.ndarray, np.ndarray]:
    """S1, S2, S4, S5, S7, S8, S10-S12: out (..., heads, Tq, dv) and lse (..., heads, Tq), by G
    workers.

    q (..., heads, Tq, d), k (..., kv_heads, Tk, d), v (..., kv_heads, Tk, dv); `lengths` int, the
    leading axes of q: the first so many keys of a sequence exist, and the last query stands at the
    last of them. N keys a tile, M queries a block (all if None), `order` that of the line. None of
    them changes the result beyond rounding.

    >>> x = np.eye(2)[None]
    >>> attend(x, x, x, np.array(1), N=1, G=2)[0]
    array([[[1., 0.],
            [1., 0.]]])
    """
    check_attention_inputs(q, k, v)
    leading, (heads, Tq, d), (Hkv, Tk) = q.shape[:-3], q.shape[-3:], k.shape[-3:-1]
    check_array("lengths", lengths, (), dtype="int")
    if lengths.shape != leading:
        raise ValueError(f"lengths: got shape {lengths.shape}, expected {leading}")
    if np.any(lengths < 0) or np.any(lengths > Tk):
        raise ValueError(f"lengths: got {lengths.tolist()}, expected lengths in 0..{Tk} (Tk)")
    batch, group, dv = math.prod(leading), heads // Hkv, v.shape[-1]
    flat_lengths = lengths.reshape(batch)
    queries = q.reshape(batch, Hkv, group, Tq, d)
    keys, values = k.reshape(batch, Hkv, Tk, d), v.reshape(batch, Hkv, Tk, dv)
    out = np.zeros_like(v, shape=(batch, Hkv, group, Tq, dv))
    lse = np.full_like(v, -np.inf, shape=(batch, Hkv, group, Tq))

    n = tiles_per_output(flat_lengths, N, Hkv, Tq, M, causal, order)
    M = block_rows(M, Tq)
    line = line_order(Hkv, batch, -(-Tq // M), order)
    start, end = lean_schedule(n, G)
    held: dict[int, Triple] = {}
    scratch: dict[int, Triple] = {}
    for segment in segments(n, start, end):
        head, entry, i = line[segment.u]
        length, block = int(flat_lengths[entry]), slice(i * M, (i + 1) * M)
        mask = _visible(Tq, Tk, length, causal)[block]
        triple = partial(
            queries[entry, head, :, block].reshape(-1, d),
            keys[entry, head],
            values[entry, head],
            segment.lo_tile * N,
            min(segment.hi_tile * N, length),
            scale,
            np.tile(mask, (group, 1)),
        )
        if segment.host:
            held[segment.u] = triple
        else:
            scratch[segment.g] = triple
    for u, triple in held.items():
        for g in helpers(n, start, end, u):
            triple = merge(triple, scratch[g])
        head, entry, i = line[u]
        block = slice(i * M, (i + 1) * M)
        block_out, block_lse = finalize(*triple)
        out[entry, head, :, block] = block_out.reshape(group, -1, dv)
        lse[entry, head, :, block] = block_lse.reshape(group, -1)
    return out.reshape(*leading, heads, Tq, dv), lse.reshape(*leading, heads, Tq)


def _visible(Tq: int, Tk: int, length: int, causal: bool) -> np.ndarray:
    """S4, S12: bool (Tq, Tk) for `length` keys, of which the last query stands at the last."""
    query, key = np.arange(Tq)[:, None], np.arange(Tk)
    last_seen = length - Tq + query if causal else length - 1 + 0 * query
    return key <= np.minimum(last_seen, length - 1)


MECHANISM = Mechanism(
    title="Lean attention",
    idea="Exact attention whose key tiles are shared evenly among workers and merged in one pass.",
    paper=Paper(
        title="Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of "
        "Transformers",
        authors=(
            "Rya Sanovar",
            "Srikant Bharadwaj",
            "Renee St. Amant",
            "Victor Rühle",
            "Saravan Rajmohan",
        ),
        year=2024,
        arxiv="2405.10480",
        venue="MLSys 2025",
        code="microsoft/onnxruntime",
    ),
    operations=(
        Operation(attend, clauses=("S1", "S2", "S4", "S5", "S7", "S8", "S10", "S11", "S12")),
        Operation(partial, clauses=("S1",)),
        Operation(merge, clauses=("S2",)),
        Operation(finalize, clauses=("S2",)),
        Operation(tile_size, clauses=("S3",)),
        Operation(line_order, clauses=("S5", "S11")),
        Operation(tiles_per_output, clauses=("S4", "S5")),
        Operation(grid_size, clauses=("S6",)),
        Operation(lean_schedule, clauses=("S7",)),
        Operation(split_bound, clauses=("S9",)),
        Operation(segments, clauses=("S8",)),
        Operation(helpers, clauses=("S8",)),
    ),
    headline="attend",
    coverage=Coverage(patterns=PATTERNS, phases=PHASES, paddings=("none", "right"), heads=HEADS),
)
