r"""TransNormerLLM with Lightning Attention: decayed linear attention in a whole layer.

Softmax and scale are dropped, and what takes their place is a norm behind the product: :math:`O =
Norm(Q (K^T V))`, which costs time linear in the tokens. The model around it has a decay per head
that grows weaker from layer to layer, a relative position on its first layer, an output gate and a
channel mixer without activation. The product is computed by blocks, quadratic inside a block, with
a small state between blocks, so the tokens a second do not depend on the length.

Definition
----------
Model width D, heads H of width d = D / H, tokens T, layers L, layer l = 0 .. L - 1, x (T, D).

S1. **SRMSNorm**: :math:`y = x / \sqrt{mean_i(x_i^2) + \epsilon}`, without weights. Its gradient is
:math:`dx = (dy - y \, mean(dy \odot y)) / rms`.

S2. **Block**: :math:`x \leftarrow x + GLA_l(SRMSNorm(x))`, then :math:`x \leftarrow x +
SGLU(SRMSNorm(x))`. One more SRMSNorm precedes the head of the model, whose embeddings are
multiplied by :math:`\sqrt D` unless that is switched off.

S3. **SGLU**: :math:`(x W_v \odot x W_u) W_o`, no activation and no bias.

S4. **Projections**: q, k, v, u are the quarters of :math:`x W_{qkvu}`. q, k and v are cut into
heads, head h being channels h d to h d + d - 1; q and k pass through SiLU, v and u do not.

S5. **LRPE**, on layers that have it: :math:`x_t \mapsto [x_t \cos(t \theta_h), x_t \sin(t
\theta_h)]` doubles the width of q and k, with :math:`\theta_{h,i} = 10000^{-2 (h d + i) / (H d)}`
and t the absolute position. The product of two such rows is :math:`\sum_i q_{ti} k_{si} \cos((t -
s) \theta_{h,i})`. :math:`\theta` may be trained.

S6. **Attention**: :math:`S_t = \lambda_h S_{t-1} + k_t v_t^T`, :math:`o_t = S_t^T q_t`, with
:math:`\lambda_h = e^{-s_h}`: no scale and no denominator. S is (d', d), d' = 2 d with LRPE.

S7. **Slopes**: :math:`s_h = 2^{-8 (h + 1) / H}` for H a power of two; else, p being the largest
power of two below H, those of p heads and then the first H - p of every second slope of 2 p heads.
Layer l has :math:`s_h (1 - l / (L - 1) + 10^{-5})`; for L = 1 the factor is :math:`1 + 10^{-5}`
(ours). They are not trained.

S8. **Output**: heads are merged to (T, D), and :math:`y = (u \odot SRMSNorm(o)) W_o`, one norm
over all heads together. Options: SiLU on v too, a gate :math:`\sigma(u)`, a layer norm.

S9. **Blocks** of m rows, with S entering: :math:`O = diag(\lambda^r) Q S + (Q K^T \odot M) V`,
:math:`M_{rs} = \lambda^{r-s}` for :math:`r \ge s`, and :math:`S \leftarrow \lambda^m S +
(diag(\lambda^{m-r}) K)^T V`, r = 1 .. m. The last block may be short. NormAttention without a decay
is :math:`\lambda = 1`.

S10. **Gradient**: a forward sweep for :math:`dQ = (dO V^T \odot M) K + diag(\lambda^r) dO S^T`, and
one from the end, R being the gradient of the state that leaves the block: :math:`dK = (dO V^T \odot
M)^T Q + diag(\lambda^{m-r}) V R^T`, :math:`dV = (Q K^T \odot M)^T dO + diag(\lambda^{m-r}) K R`,
:math:`R \leftarrow \lambda^m R + (diag(\lambda^r) Q)^T dO`.

S11. **Decode**: a call returns the state behind its last token. The next call takes it, with
`offset` the number of tokens before, which places its new tokens alone.

S12. **Batches**. Packed sequences each start from their own state and position. A padded token
writes nothing and does not age the state (ours: the authors set its v to 0, which is exact with
padding on the left); its place is counted by S5, and its output is 0.

S13. **Heads** are equal in q, k and v.

S14. **Gradient of a layer**: S1, S3, S5 and S10 joined by the chain rule; the slopes get one too.
In a batch (S12) weights get the sum over its sequences, and what is padded gets and gives nothing.

Complexity
----------
Time :math:`O(T d^2 + T B d)` a head for blocks of B rows and a state of :math:`d' d` numbers. With
a block of all tokens it is the quadratic product that the name "Lightning Attention" first stood
for, in the model's 2023 report: the same function at another cost.

Paper and code
--------------
The paper has the decay :math:`e^{-(8 h / H)(1 - l / L)}`, linear in h, the released models have S7;
`layer_slopes` gives the former for `decay_rule="linear"`, with h from 1 (ours: the paper does not
say where h starts). The paper's norm has no :math:`\epsilon`; the code has 1e-6 and statistics in
float32. The paper's reverse sweep prints KV where R is meant. In training mode the released model's
code moves the cached keys by the offset as well; S11 is its inference mode. The authors' standalone
module is the options of S8 together, with a gate of low rank, :math:`W_u = W_1 W_2`, and a gain and
bias in its layer norm, which are left out here (ours). A gradient at a row of zeros with
:math:`\epsilon = 0` does not exist and counts as 0 (ours).
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.linear.lightning_attention_1_batches import (
    tnl_gla_packed,
    tnl_gla_packed_backward,
    tnl_gla_padded,
    tnl_gla_padded_backward,
)
from attnspec.reference.linear.lightning_attention_1_checks import (
    BLOCK_WEIGHTS,
    Params,
    check_block,
    check_gla,
)
from attnspec.reference.linear.lightning_attention_1_decay import (
    decay_attend,
    decay_attend_backward,
    decay_attend_recurrence_backward,
    decay_attend_tiled,
    decay_attend_tiled_backward,
    layer_slopes,
    norm_attention,
    norm_attention_backward,
    slopes,
)
from attnspec.reference.linear.lightning_attention_1_layers import (
    mix,
    tnl_block_backward,
    tnl_gla_backward,
)
from attnspec.reference.linear.lightning_attention_1_rows import (
    lrpe,
    lrpe_backward,
    lrpe_frequencies,
    sglu,
    sglu_backward,
    srms_norm,
    srms_norm_backward,
)
from attnspec.reference.spec import PADDINGS, PHASES, Coverage, Mechanism, Operation, Paper


def tnl_gla(
    x: np.ndarray,
    params: Params,
    state: np.ndarray | None = None,
    offset: int = 0,
    *,
    v_activation: bool = False,
    gate: str = "linear",
    norm: str = "srms",
    eps: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray]:
    """S4-S8, S11: y (..., T, D) and the state (..., H, d', d) of x (..., T, D), already normed.

    `params` maps Wqkvu (D, 4 D), Wo (D, D), slopes (H,) of this layer and theta (H, d), which is
    None or missing on layers without LRPE. The last four arguments are the options of S8.

    >>> weights = {"Wqkvu": np.ones((1, 4)), "Wo": np.ones((1, 1)), "slopes": np.zeros(1)}
    >>> y, state = tnl_gla(np.ones((2, 1)), weights, eps=0.0)
    >>> y.ravel(), state.ravel().round(4)
    (array([1., 1.]), array([1.4621]))
    """
    check_gla(x, params, state, offset, v_activation, gate, norm, eps)
    return mix(x, params, state, offset, v_activation=v_activation, gate=gate, norm=norm, eps=eps)


def tnl_block(
    x: np.ndarray,
    params: Params,
    state: np.ndarray | None = None,
    offset: int = 0,
    *,
    v_activation: bool = False,
    gate: str = "linear",
    norm: str = "srms",
    eps: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray]:
    """S2: y (..., T, D) and the state (..., H, d', d), norms and residuals inside.

    `params` as in `tnl_gla`, with Wv and Wu (D, F) and Wd (F, D), the W_o of S3.

    >>> weights = {"Wqkvu": np.ones((1, 4)), "Wo": np.ones((1, 1)), "slopes": np.zeros(1)}
    >>> weights |= {name: np.ones((1, 1)) for name in ("Wv", "Wu", "Wd")}
    >>> tnl_block(np.full((1, 1), 5.0), weights, eps=0.0)[0]
    array([[7.]])
    """
    check_block(x, params, state, offset, v_activation, gate, norm, eps)
    mixed, state = mix(
        srms_norm(x, eps), params, state, offset, v_activation=v_activation, gate=gate, norm=norm,
        eps=eps,
    )  # fmt: skip
    x = x + mixed
    return x + sglu(srms_norm(x, eps), *(params[name] for name in BLOCK_WEIGHTS)), state


_DECAYED = ("q", "k", "v", "slopes", "S0")
_LAYER = ("x", "params", "state")

MECHANISM = Mechanism(
    title="TransNormerLLM (Lightning Attention)",
    idea="Decayed linear attention, normed over all heads and gated, in blocks of constant speed.",
    paper=Paper(
        title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning "
        "Attention",
        authors=("Zhen Qin", "Weigao Sun", "Dong Li", "Xuyang Shen", "Weixuan Sun", "Yiran Zhong"),
        year=2024,
        arxiv="2405.17381",
        venue="ICML",
        code="OpenNLPLab/TransnormerLLM",
    ),
    operations=(
        Operation(slopes, clauses=("S7",)),
        Operation(layer_slopes, clauses=("S7",)),
        Operation(srms_norm, ("S1",), srms_norm_backward, ("x",)),
        Operation(sglu, ("S3",), sglu_backward, ("x", "Wv", "Wu", "Wo")),
        Operation(lrpe_frequencies, clauses=("S5",)),
        Operation(lrpe, ("S5",), lrpe_backward, ("x", "theta")),
        Operation(decay_attend, ("S6", "S13"), decay_attend_recurrence_backward, _DECAYED),
        Operation(decay_attend_tiled, ("S9", "S13"), decay_attend_tiled_backward, _DECAYED),
        Operation(decay_attend_backward, clauses=("S10",)),
        Operation(norm_attention, ("S9", "S13"), norm_attention_backward, ("q", "k", "v")),
        Operation(tnl_gla, ("S4", "S5", "S6", "S8", "S11", "S13", "S14"), tnl_gla_backward, _LAYER),
        Operation(
            tnl_gla_packed, ("S12", "S14"), tnl_gla_packed_backward, ("x", "params", "states")
        ),
        Operation(tnl_gla_padded, ("S12", "S14"), tnl_gla_padded_backward, _LAYER),
        Operation(tnl_block, ("S2", "S3", "S14"), tnl_block_backward, _LAYER),
    ),
    headline="tnl_gla",
    coverage=Coverage(
        patterns=("causal self",),
        phases=PHASES,
        paddings=PADDINGS,
        heads=("MHA",),
        gradient=True,
    ),
)
