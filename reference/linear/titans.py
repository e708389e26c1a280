r"""Titans: a memory that learns at test time, by gradient descent with momentum and forgetting.

The state is a small network M, a matrix or an MLP, trained online for every sequence to map keys to
values. The gradient of its loss, the surprise, enters a momentum; the weights follow the momentum
and decay; the rates depend on the token. Fixing the point of the gradient for a chunk of tokens
turns training into a few products. Three layouts join the memory to attention.

Definition
----------
One head, rows: k and q (T, d), v (T, dv); rates :math:`\theta_t \ge 0` (step), :math:`\eta_t` and
:math:`\alpha_t` in [0, 1] (momentum, forgetting).

S1. **Memory.** :math:`M(x) = gelu(... gelu(x W_1) ...) W_L`, :math:`L \ge 1`, without biases; the
exact GELU stands between layers only. L = 1 is the linear memory, :math:`x W`.

S2. **Surprise.** The loss of a token is :math:`|M(k_t) - v_t|^2`. With :math:`h_0 = k`,
:math:`z_l = h_{l-1} W_l`, :math:`h_l = gelu(z_l)`: :math:`\delta_L = c (z_L - v)`, :math:`\delta_l
= (\delta_{l+1} W_{l+1}^T) gelu'(z_l)`, :math:`u_l = h_{l-1}^T \delta_l`. `loss_scale` c is 2 for
the sum of squares, 2/dv for the mean, 1 for half.

S3. **Rule.** :math:`S_t = \eta_t S_{t-1} - \theta_t u_t`, :math:`W_t = (1 - \alpha_t) W_{t-1} +
S_t`, alike for every layer; S is zero at first unless given, W is given (learned; a linear memory
may start from zeros).

S4. **Chunk.** :math:`u_t` is taken at the weights that entered t's chunk of b tokens: b = 1 is the
exact rule, and b >= T never leaves the first weights.

S5. **Read.** :math:`y_t = M_{W_t}(q_t)`, behind the store; `read` "exclusive" takes
:math:`W_{t-1}`.

S6. **Coefficients** of a chunk, t = 1..C: :math:`\beta_t = (1 - \alpha_t) \beta_{t-1}`,
:math:`m_t = \eta_t m_{t-1}` (both from 1), :math:`f_t = (1 - \alpha_t) f_{t-1} + m_t` (from 0); for
every j, :math:`n_{jj} = G_{jj} = \theta_j`, :math:`n_{tj} = \eta_t n_{t-1,j}` and :math:`G_{tj} =
(1 - \alpha_t) G_{t-1,j} + n_{tj}` for t > j; 0 for t < j.

S7. **Unrolled.** :math:`W_t = \beta_t W + f_t S - \sum_{j \le t} G_{tj} u_j` and :math:`S_t = m_t S
- \sum_{j \le t} n_{tj} u_j`, where W and S entered the chunk.

S8. **Linear chunk.** :math:`E = c (K W - V)`; :math:`Y = \beta Q W + f Q S - (Q K^T \odot G) E`;
W and S leave as in S7 at t = C, whose sums are :math:`K^T diag(G_C) E` and :math:`K^T diag(n_C) E`.

S9. **Deep chunk.** The same with :math:`h_{l-1}` for K and :math:`\delta_l` for E; the read goes
layer by layer: :math:`A_0 = Q`, :math:`Z_l = \beta A_{l-1} W_l + f A_{l-1} S_l - (A_{l-1} h_{l-1}^T
\odot G) \delta_l`, :math:`A_l = gelu(Z_l)`, :math:`Y = Z_L`.

S10. **Granular chunks**, a third party's form: :math:`\eta` and :math:`\alpha` belong to a chunk of
c tokens (made from the mean of its rows), :math:`g = \sum \theta_t u_t` over it, :math:`S
\leftarrow \eta S - g`, :math:`W \leftarrow (1 - \alpha) W + S`. Token t, from 0, reads behind
:math:`\lfloor (t+1)/c \rfloor` complete chunks; an incomplete one is not stored, and its tokens
belong to the next call. The gradient's weights are renewed every `batch_size` tokens, or never,
which is the default.

S11. **Inputs.** :math:`q, k, v = conv(silu(x W))` with a depthwise causal convolution each; q and k
divided by their norm, the root of the sum of squares plus 1e-6. :math:`\alpha` and :math:`\eta` are
sigmoids of linear maps of x, :math:`\theta` is `theta_max` times one.

S12. **Persistent tokens.** P (N_p, D), learnable and independent of the input, precede the
sequence; N_p = 0 is none.

S13. **Masks.** MAC: row r of a segment sees P, the segment's memory rows (up to r if `tokenwise`)
and its tokens up to r. MAG: the last w tokens and, at any distance, P.

S14. **MAC.** A segment asks the old memory, :math:`h = M(x M_q)`; attention over [P | h | x],
without positions, gives y for its rows; y is stored, from a new gradient chunk on; :math:`o =
gate(y, M'(y M_q))` with the new weights, those behind the segment or, `tokenwise`, behind each
row's own store. Segments meet in the memory alone. Here and in S15 and S16 `normalise` divides the
memory's queries and keys by their norm as S11 does: without it a memory can outgrow any number.

S15. **MAG.** On [P | x], gate(windowed attention that always sees P, memory), the last T rows. The
memory stores P too and is read token by token.

S16. **MAL.** Windowed attention over what the memory returned for [P | x], the last T rows; the
window treats rows of P as any others (ours). The memory alone, LMM, is S8 or S9 on the inputs S11.

S17. **Gate.** :math:`gate(y, h) = rms(y) g_1 \cdot \sigma(rms(h) g_2)`, where rms divides by the
root of the mean square plus 1e-6.

S18. **Decode.** The state is the gradient's weights, W, S and the tokens of the chunk so far.
Weights and momentum alone start a new chunk.

S19. **Padding.** A padded token is skipped: it neither moves the weights nor counts in a chunk, and
its row of y is 0. A step of 0 would not do, because the momentum would still move W.

S20. **Heads.** Each kv head has a memory, read by the query heads of its group (K7).

S21. **Gradient.** Through the end of the chunk, the read and the inner gradient, chunk by chunk
from the last; the coefficients' recurrences are walked backward. Layouts go back through the gate,
attention and memory.

S22. **Packed.** Sequences end to end, of which any may be empty: every one has first weights and a
first momentum of its own (or shares those given for all), its gradient chunks begin with its first
token, and its memory is what is left behind its last one. Nothing passes from one to another.

Complexity
----------
Time O(T (L d h + b (d + h))) for a hidden width h, memory O(L d h) for each head; a decoded token
costs O(L d h). No token has weights of its own in memory.

Paper and code
--------------
The authors published no code. The paper leaves open the activation, when to read, the gate, the
form of the rates, the width of the convolution, b and L: the defaults here are ours. Its best
memories have L of 2 or more; public code has L = 2, hidden layers 2 or 4 times as wide as d, b from
16 to 64 and a `theta_max` of 1, and a convolution of 4 rows is customary. Its index of the
gradient's weights would need the weights it is computing at t = b; S4 is the reading that does not.
Its chunk equation drops the factor 2 and writes x for k and v. MAC as written is not causal by
token (row r sees memory rows asked for by later ones, and weights that have stored later ones), so
that a language model trained with it sees its labels: `tokenwise` is ours. What follows a layout, a
norm, a linear gate, a projection and the residual, is the caller's. One public implementation is
S10 with loss_scale 2/d; its wrapper of the memory, :math:`LN(M(x)) (1 + \gamma) + x`, is not in the
paper and not here. Another has the coefficients S6, but normalises the memory's output and aims at
v - k: a different function.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.linear.titans_batches import (
    titans_packed_linear,
    titans_packed_linear_backward,
    titans_packed_mlp,
    titans_packed_mlp_backward,
)
from attnspec.reference.linear.titans_chunks import (
    check_memory_inputs,
    end_chunk,
    fold,
    reading,
)
from attnspec.reference.linear.titans_coefficients import (
    titans_coefficients,
    titans_coefficients_backward,
)
from attnspec.reference.linear.titans_deep import titans_chunk_mlp
from attnspec.reference.linear.titans_gradients import (
    titans_chunk_linear_backward,
    titans_chunk_mlp_backward,
)
from attnspec.reference.linear.titans_granular import titans_chunk_granular
from attnspec.reference.linear.titans_granular_gradients import titans_chunk_granular_backward
from attnspec.reference.linear.titans_inputs import token_inputs, token_step_sizes
from attnspec.reference.linear.titans_layout_gradients import (
    mac_segment_backward,
    mag_backward,
    mal_backward,
)
from attnspec.reference.linear.titans_layouts import (
    gate,
    mac_segment,
    mag,
    mal,
    persistent_prefix,
    titans_mask_mac,
    titans_mask_mag,
)
from attnspec.reference.linear.titans_memory import memory_grad, mlp_memory
from attnspec.reference.linear.titans_sequential import decode_step, titans_sequential
from attnspec.reference.spec import HEADS, PHASES, Coverage, Mechanism, Operation, Paper


def titans_chunk_linear(
    W0: np.ndarray, S0: np.ndarray | None, k: np.ndarray, v: np.ndarray, q: np.ndarray, rates: Any,
    b: int, *, loss_scale: float = 2.0, read: str = "inclusive", valid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """S8: y (..., heads, T, dv) and the last W and S (..., kv_heads, d, dv) of a linear memory.

    W0 and S0 (..., kv_heads, d, dv) or without the leading axes; k (..., kv_heads, T, d), v (...,
    kv_heads, T, dv), q (..., heads, T, d); rates theta, eta, alpha, each a number or (...,
    kv_heads, T); `valid` bool (..., T), without heads, is True at real tokens.

    >>> x = np.ones((1, 2, 1))
    >>> y, W, S = titans_chunk_linear(np.zeros((1, 1)), None, x, x, x, (0.5, 0.0, 0.0), 2)
    >>> y.ravel(), W.ravel()
    (array([1., 2.]), array([2.]))
    """
    first, momentum = (None if x is None else (x,) for x in (W0, S0))
    (W,), (S,), tokens = check_memory_inputs(
        first, momentum, k, v, q, rates, b, loss_scale, read, valid
    )
    outputs = [np.zeros_like(v, shape=(*q.shape[:-2], 0, v.shape[-1]))]
    for _, chunk in tokens.chunks(b):
        of, Q = chunk.coefficients(), fold(chunk.q, k.shape[-3])
        reads = reading(of, read, q.shape[-3] // k.shape[-3])
        K_T = np.swapaxes(chunk.k, -1, -2)
        E = loss_scale * (chunk.k @ W - chunk.v)
        Y = reads.beta * (Q @ W) + reads.f * (Q @ S) - ((Q @ K_T) * reads.G) @ E
        outputs.append(Y.reshape(*chunk.q.shape[:-1], v.shape[-1]))
        (W,), (S,) = end_chunk((W,), (S,), (chunk.k,), (E,), of)
    return tokens.back(np.concatenate(outputs, axis=-2)), W, S


_STATEFUL = ("W0", "S0", "k", "v", "q", "rates")
_LAYOUT = ("P", "W", "S", "attn", "mem", "rates")

MECHANISM = Mechanism(
    title="Titans",
    idea="A memory trained at test time by gradients with momentum and forgetting, in chunks.",
    paper=Paper(
        title="Titans: Learning to Memorize at Test Time",
        authors=("Ali Behrouz", "Peilin Zhong", "Vahab Mirrokni"),
        year=2024,
        arxiv="2501.00663",
    ),
    operations=(
        Operation(mlp_memory, clauses=("S1",)),
        Operation(memory_grad, clauses=("S2",)),
        Operation(
            titans_coefficients,
            clauses=("S6",),
            gradient=titans_coefficients_backward,
            differentiable=("theta", "eta", "alpha"),
        ),
        Operation(titans_sequential, clauses=("S3", "S4", "S5", "S19", "S20")),
        Operation(
            titans_chunk_linear,
            clauses=("S4", "S5", "S7", "S8", "S19", "S20"),
            gradient=titans_chunk_linear_backward,
            differentiable=_STATEFUL,
        ),
        Operation(
            titans_chunk_mlp,
            clauses=("S4", "S5", "S7", "S9", "S19", "S20"),
            gradient=titans_chunk_mlp_backward,
            differentiable=_STATEFUL,
        ),
        Operation(
            titans_packed_linear,
            clauses=("S8", "S20", "S22"),
            gradient=titans_packed_linear_backward,
            differentiable=_STATEFUL,
        ),
        Operation(
            titans_packed_mlp,
            clauses=("S9", "S20", "S22"),
            gradient=titans_packed_mlp_backward,
            differentiable=_STATEFUL,
        ),
        Operation(
            titans_chunk_granular,
            clauses=("S10", "S20"),
            gradient=titans_chunk_granular_backward,
            differentiable=("W0", "S0", "k", "v", "q", "theta", "eta", "alpha"),
        ),
        Operation(decode_step, clauses=("S18", "S20")),
        Operation(token_inputs, clauses=("S11",)),
        Operation(token_step_sizes, clauses=("S11",)),
        Operation(persistent_prefix, clauses=("S12",)),
        Operation(titans_mask_mac, clauses=("S13",)),
        Operation(titans_mask_mag, clauses=("S13",)),
        Operation(gate, clauses=("S17",)),
        Operation(
            mac_segment,
            clauses=("S14",),
            gradient=mac_segment_backward,
            differentiable=("seg", *_LAYOUT, "gains"),
        ),
        Operation(
            mag,
            clauses=("S15",),
            gradient=mag_backward,
            differentiable=("x", *_LAYOUT, "gains"),
        ),
        Operation(mal, clauses=("S16",), gradient=mal_backward, differentiable=("x", *_LAYOUT)),
    ),
    headline="titans_chunk_linear",
    coverage=Coverage(
        patterns=("causal self",),
        phases=PHASES,
        paddings=("none", "left", "right", "packed"),
        heads=HEADS,
        gradient=True,
    ),
)
