r"""NTK-Attention: a prefix of any length, learned as a state of d dv + d numbers.

Prefix tuning puts m trainable keys and values before the tokens; a longer prefix learns more and
costs more. A query feels the prefix through two sums only, so if :math:`e^{q \cdot k}` is replaced
by :math:`\phi(q) \cdot \phi(k)` these become products with a matrix Z and a vector k, whose size
does not depend on m. Z and k are trained directly, while the tokens keep their exact softmax.

Definition
----------
S1. **Score.** :math:`s_{ij} = q_i \cdot K_j / \sqrt{d}` (K2, K7). A key is visible if the causal
rule (K3) and the padding `key_mask` both allow it. `scale` may replace :math:`1 / \sqrt d` here.

S2. **Feature map.** :math:`\phi(x) = \mathrm{elu}(x / d^{1/4}) + 1` elementwise, d the width of x:
with :math:`y = x\, d^{-1/4}` it is :math:`1 + y` for :math:`y \ge 0` and :math:`e^y` below 0.

S3. **Prefix terms.** :math:`num_i = \phi(q_i) Z` and :math:`den_i = \phi(q_i) \cdot \kappa` with
:math:`\kappa = |k|`, or softplus(k) as an option. Z (heads, d, dv) and k (heads, d) belong to a
*query* head and serve the whole batch; Z may have either sign. No mask hides the prefix.

S4. **Attend.** :math:`D_i = \sum_j e^{s_{ij}} + den_i` and :math:`out_i = (\sum_j e^{s_{ij}} V_j +
num_i) / D_i` over the visible keys j. A row that sees no key is :math:`num_i / den_i`, not 0 (K4);
if :math:`D_i` is 0, the output is 0.

S5. **Stable form.** Both sums are multiplied by :math:`e^{-m_i}`, where :math:`m_i = \max(0, \max_j
s_{ij})` over the *visible* keys; no exponential exceeds 1. Where num and den are all 0 the 0 is
left out of the maximum, which makes the row plain softmax attention however low its scores are.

S6. **Merge form.** Equal to S4, from any softmax attention with its lse :math:`\ell_i`: with
:math:`p_i = \max(0, \ell_i)`, :math:`out_i = (e^{\ell_i - p_i} o_i + e^{-p_i} num_i) / (e^{\ell_i -
p_i} + e^{-p_i} den_i)`. Where :math:`den_i > 0` this is :math:`keep_i\, o_i + (1 - keep_i)\, num_i
/ den_i` with :math:`keep_i = \sigma(\ell_i - \log den_i)`, the share of the tokens, which rises
with every key that becomes visible.

S7. **Prefix to state.** A given prefix :math:`(K_P, V_P)` has :math:`Z = \phi(K_P)^T V_P` and
:math:`k = \phi(K_P)^T 1`; prefixes laid end to end add their states.

S8. **Gradient.** With :math:`P_{ij} = e^{s_{ij}} / D_i`, :math:`G = dout`, :math:`g_i = G_i \cdot
out_i`: :math:`dV_j = \sum_i P_{ij} G_i`, :math:`ds_{ij} = P_{ij} (G_i \cdot V_j - g_i)`,
:math:`dK_j = \sum_i ds_{ij} q_i / \sqrt d`, :math:`dZ = \sum_i \phi(q_i)^T G_i / D_i`,
:math:`d\kappa = -\sum_i \phi(q_i) g_i / D_i`, :math:`dk = \mathrm{sign}(k)\, d\kappa` and
:math:`dq_i = \sum_j ds_{ij} K_j / \sqrt d + \phi'(q_i) (Z G_i - \kappa g_i) / D_i` with
:math:`\phi'(x) = d^{-1/4} \min(1, e^y)`. dZ and dk are summed over the batch, dK and dV over each
group. Softplus has :math:`dk = \sigma(k)\, d\kappa`. D itself may overflow, so 1/D is
:math:`e^{-m}` over the sum of S5.

S9. **Decode.** The state is an ordinary cache of keys and values; Z and k stay as they are.

S10. **Packed sequences.** Laid end to end, with offsets of the queries and of the keys, each is S4
by itself: causal by its own tokens (K3), with the same Z and k before all of them. Their gradients
are sums over the sequences.

Complexity
----------
The softmax's :math:`O(q\_tokens \cdot k\_tokens \cdot d)` a head, and :math:`O(q\_tokens \cdot d
\cdot dv)` for the prefix, whatever its length.

Paper and code
--------------
- The paper is unmasked; the authors' code masks, but stabilises by the maximum over *all* scores,
  which lets later tokens in through rounding and underflow. S5 takes visible ones (our choice).
  The code computes in float32, whatever it is given.
- The paper has k non-negative, the code takes the absolute value of a free k, as here; softplus is
  ours. A k of zeros has gradient 0 under the absolute value and never learns: the vision code
  starts from Z = 0 and k = 0, which is the frozen model, the chat-model code from random numbers.
  We advise Z = 0 and a small positive k such as 1e-3.
- The theory has a polynomial map of some width r, with which :math:`\phi(q) \cdot \phi(k)` is
  within a factor :math:`1 \pm \epsilon` of :math:`e^{q \cdot k / \sqrt d}`; the code has S2, with
  r = d. Other maps, and a Z kept as a product of two thin factors, need no operation of their own:
  S6 takes their num and den. With S2, S7 is exact for a prefix weighted by :math:`\phi(q) \cdot
  \phi(k)`, and not close to one weighted by exp.
- With rotary positions q is rotated before it comes here: the prefix sees rotated queries.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_size
from attnspec.reference.dense.attention import State, combine
from attnspec.reference.linear.ntk_attention_batches import ntk_packed, ntk_packed_backward
from attnspec.reference.linear.ntk_attention_gradients import ntk_backward
from attnspec.reference.linear.ntk_attention_prefix import (
    merge_prefix,
    phi,
    prefix_state,
    prefix_terms,
    shares,
)
from attnspec.reference.linear.ntk_attention_scores import check_inputs, visible_scores
from attnspec.reference.spec import (
    HEADS,
    PADDINGS,
    PATTERNS,
    PHASES,
    Coverage,
    Mechanism,
    Operation,
    Paper,
)


def ntk_attend(
    q: np.ndarray,
    K: np.ndarray,
    V: np.ndarray,
    Z: np.ndarray,
    k: np.ndarray,
    *,
    causal: bool = False,
    key_mask: np.ndarray | None = None,
    scale: float | None = None,
    positivity: str = "abs",
) -> np.ndarray:
    """S1-S5: outputs (..., heads, q_tokens, dv).

    q (..., heads, q_tokens, d), K (..., kv_heads, k_tokens, d), V (..., kv_heads, k_tokens, dv),
    Z (heads, d, dv), k (heads, d); `key_mask` bool (..., k_tokens), True = a real key. `scale` is
    that of the scores alone. TypeError or ValueError if they do not fit one another (K14).

    >>> x, one = np.zeros((1, 1, 1)), np.ones((1, 1, 1))
    >>> ntk_attend(x, x, 5 * one, Z=one, k=one[0])
    array([[[3.]]])
    """
    check_inputs(q, K, V, Z, scale)
    num, den = prefix_terms(q, Z, k, positivity=positivity)
    weights, unit, total, _ = shares(visible_scores(q, K, causal, key_mask, scale), num, den)
    return combine(weights, V) + unit[..., None] * num / total[..., None]


def step(
    state: State,
    q: np.ndarray,
    K: np.ndarray,
    V: np.ndarray,
    Z: np.ndarray,
    k: np.ndarray,
    *,
    scale: float | None = None,
    positivity: str = "abs",
) -> tuple[np.ndarray, State]:
    """S9: outputs (..., heads, tokens, dv) of new tokens, and the state that includes them.

    The first state is dense attention's `init_state`.

    >>> x, one = np.zeros((1, 1, 1)), np.ones((1, 1, 1))
    >>> empty = State(x[:, :0], x[:, :0])
    >>> out, state = step(empty, x, x, 5 * one, one, one[0])
    >>> out, state.k.shape
    (array([[[3.]]]), (1, 1, 1))
    """
    if not isinstance(state, State):
        raise TypeError(f"state: got {type(state).__name__}, expected State")
    check_inputs(q, K, V, Z, scale)
    check_size("K", K.shape[-2], q.shape[-2], "tokens, as in q")
    for name, old, new in (("state.k", state.k, K), ("state.v", state.v, V)):
        if (*old.shape[:-2], old.shape[-1]) != (*new.shape[:-2], new.shape[-1]):
            raise ValueError(f"{name}: got shape {old.shape}, expected that of {new.shape}")
    keys = np.concatenate([state.k, K], axis=-2)
    values = np.concatenate([state.v, V], axis=-2)
    out = ntk_attend(q, keys, values, Z, k, causal=True, scale=scale, positivity=positivity)
    return out, State(keys, values)


MECHANISM = Mechanism(
    title="NTK-Attention",
    idea="A learned prefix of any length, kept as a small linear-attention state beside softmax.",
    paper=Paper(
        title="Towards Infinite-Long Prefix in Transformer",
        authors=("Yingyu Liang", "Zhenmei Shi", "Zhao Song", "Chiwun Yang"),
        year=2024,
        arxiv="2406.14036",
        venue="EMNLP 2025",
        code="ChristianYang37/chiwun",
    ),
    operations=(
        Operation(phi, clauses=("S2",)),
        Operation(prefix_state, clauses=("S2", "S7")),
        Operation(prefix_terms, clauses=("S2", "S3")),
        Operation(
            ntk_attend,
            clauses=("S1", "S3", "S4", "S5"),
            gradient=ntk_backward,
            differentiable=("q", "K", "V", "Z", "k"),
        ),
        Operation(
            ntk_packed,
            clauses=("S4", "S10"),
            gradient=ntk_packed_backward,
            differentiable=("q", "K", "V", "Z", "k"),
        ),
        Operation(merge_prefix, clauses=("S5", "S6")),
        Operation(step, clauses=("S9",)),
    ),
    headline="ntk_attend",
    coverage=Coverage(
        patterns=PATTERNS,
        phases=PHASES,
        paddings=PADDINGS,
        heads=HEADS,
        gradient=True,
    ),
)
