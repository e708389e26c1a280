r"""Dynamical Systems Framework: attention, state space models and RNNs as one linear system.

Softmax and linear attention, S6 and Mamba-2, and a gated RNN are all a state that decays, takes in
a value and is read, with matrices that depend on the input. Written this way they differ in three
things only: how large the state is, how a normaliser enters decay and input, and whether decay and
input share a parameter. The mappings are identities, so that what equals what, and what does not,
can be computed.

Definition
----------
Tokens i = 0..T-1. :math:`u_i \in R^{dv}` are the values of one head, :math:`y_i` its outputs, h the
state of N numbers with :math:`h_{-1} = 0` unless one is handed in.

S1. **System.** :math:`h_i = \Lambda_i h_{i-1} + B_i u_i`, :math:`y_i = C_i h_i + D_i u_i`, with
:math:`\Lambda_i` diagonal and kept as a vector, :math:`B_i` (N, dv), :math:`C_i` (dv, N) and
:math:`D_i` (dv, dv) or 0.

S2. **Matrix.** :math:`y = \Phi u`, block lower triangular: :math:`\Phi_{ij} = C_i \Lambda_i \cdots
\Lambda_{j+1} B_j` for j < i and :math:`\Phi_{ii} = C_i B_i + D_i`. The products are formed as they
stand, never as ratios of cumulative ones, so that :math:`\Lambda = 0` is exact.

S3. **Gauge.** For invertible diagonal :math:`T_i`, :math:`(T_i \Lambda_i T_{i-1}^{-1}, T_i B_i, C_i
T_i^{-1})` has the same outputs; :math:`T_{-1} = 1`. Every mapping below is one choice of many.

S4. **Separable attention** :math:`y_i = \eta_i^{-1} \sum_{j \le i} \phi(q_i) \cdot \psi(k_j)\, v_j`
with n features and a normaliser :math:`\eta_i > 0` that knows the prefix. N = n dv, h arranged (dv,
n). Form 1: :math:`\Lambda_i = \eta_{i-1} / \eta_i` (1 at i = 0), :math:`B_i = \eta_i^{-1} I \otimes
\psi(k_i)`, :math:`C_i = I \otimes \phi(q_i)^T`. Form 2, the same in another gauge: :math:`\Lambda_i
= 1`, :math:`B_i = I \otimes \psi(k_i)`, :math:`C_i = \eta_i^{-1} I \otimes \phi(q_i)^T`.

S5. **Linear attention**: :math:`\phi = \psi = \mathrm{elu} + 1`, no scale, :math:`\eta_i =
\phi(q_i) \cdot \sum_{j \le i} \psi(k_j)`. It depends on the query, so form 2 is the one to run. A
row whose :math:`\eta` is 0 in the dtype outputs 0 (K4).

S6. **Softmax**: :math:`e^{q \cdot k / \sqrt d}` is the inner product of infinitely many features
:math:`\phi(x) = [x^{\otimes p} / (d^{p/4} \sqrt{p!})]_{p = 0, 1, 2, \ldots}`. Cut at order P there
are :math:`\sum_{p \le P} d^p` of them, or :math:`\binom{d + P}{P}` with each product once, and the
error at score s is at most :math:`e^{|s|} |s|^{P+1} / (P+1)!`. P = 2 is the map of Based; an odd P
can make a weight negative.

S7. **Normalised attention**: :math:`\phi = \psi` = identity and :math:`\eta_i = e^{n_i}`, where n
is a learned projection of token i alone: :math:`y_i = e^{-n_i} \sum_{j \le i} (q_i \cdot k_j) v_j`.
No scale; scores may be negative; rows do not sum to 1.

S8. **S6** (Mamba), for channel c and A > 0: :math:`h_{i,c} = e^{-\Delta_{i,c} A_c} h_{i-1,c} +
\Delta_{i,c} u_{i,c} b_i`, :math:`y_{i,c} = c_i \cdot h_{i,c} + D_c u_{i,c}`. :math:`\Delta` comes
after its softplus and bias; b enters by Euler's rule. :math:`\Lambda_i = e^{-\Delta_i A}`,
:math:`B_i = \mathrm{diag}(\Delta_i) \otimes b_i`, :math:`C_i = I \otimes c_i^T`, :math:`D_i =
\mathrm{diag}(D)`.

S9. **SSD** (Mamba-2): one a and one :math:`\Delta_i` a head, :math:`\Lambda_i = e^{-a \Delta_i}`.

S10. **Reversed sigmoid**: :math:`e^{-a\, \mathrm{softplus}(x)} = (1 + e^x)^{-a} = \sigma(-x)^a`: a
gate is a decay.

S11. **qLSTM**, gates that depend on the input alone: :math:`a_t = \sigma(f_t)`, or reversed
:math:`a_t = \sigma(-f_t)^{\mathrm{relu}(\alpha)}` with one :math:`\alpha`; :math:`h_t = a_t h_{t-1}
+ \sigma(i_t) z_t`, :math:`y_t = \sigma(o_t) h_t`. n = 1, :math:`\Lambda = a`, :math:`B =
\mathrm{diag}(\sigma(i))`, :math:`C = \mathrm{diag}(\sigma(o))`. The layer: [gate | branch] = W x; z
= causal depthwise convolution of branch, 4 wide, with zeros in front, a bias and no activation
behind; [f | i | o] = W' z + bias'; output W'' (gelu(gate) y), the exact GELU. The state of the
layer is h and the last width - 1 rows of branch. :math:`\alpha` is learned and starts at 1.

S12. **RG-LRU**: :math:`\Lambda_i = e^{-c\, \mathrm{softplus}(\lambda) \sigma(r_i)}`, :math:`B_i =
\mathrm{diag}(\sqrt{1 - \Lambda_i^2}\, \sigma(g_i))`, C = 1, with c = 8.

S13. **SSD is linear attention with decay**: :math:`q = c`, :math:`k = b`, :math:`v_i = \Delta_i
u_i`, log decay :math:`-a \Delta_i`, no normaliser.

S14. **SSD is form 1** with :math:`\eta_i = e^{a \sum_{l \le i} \Delta_l}`, :math:`\phi = c`,
:math:`\psi_i = \eta_i \Delta_i b_i`. Conversely separable attention is an SSD iff :math:`\eta`
never falls, and grows at i > 0 wherever :math:`\psi(k_i) \ne 0`, since :math:`\Delta_i = 0` would
switch the input off. With queries that turn, linear attention is none.

S15. **Coupling**: one :math:`\Delta` sets decay and input strength of an SSM, one :math:`\eta` both
of attention; normalised attention only learns the scale of what it reads. The reversed gate with
:math:`\alpha = a` and f the pre-activation of :math:`\Delta` has the decay of S8 with n = 1, and is
S8 once :math:`\sigma(i)` is replaced by :math:`\Delta b` and :math:`\sigma(o)` by c.

S16. **Recurrence.** The state alone, for vectors: :math:`h_t = a_t \odot h_{t-1} + x_t` for any a,
also 0, negative or above 1. Gradient, from the end: :math:`g_t = dh_t + a_{t+1} g_{t+1}`, to which
the gradient of the returned state is added undecayed at the last token, :math:`dx = g`,
:math:`da_t = g_t h_{t-1}` and :math:`dh_{-1} = a_0 g_0`. The gradients of all the others follow by
the chain rule.

S17. **Recall task.** P keys from [1, V/2) and P values from [V/2, V), distinct: k1 v1 k2 v2 ... and
then L - 2P + 1 fillers 0. P of the (L - 2P) // 2 slots are drawn without replacement with
probability :math:`\propto g^{0.01 - 1}`, g = 1, 2, ...; key p is asked for again at position 2P + 2
slot and labelled there with its value; other labels are -100. The last token is dropped. Fillers
may be random tokens instead, among which a key can occur unasked. Accuracy counts exact matches at
labels.

S18. **Packed sequences** lie end to end on the token axis; `offsets` (sequences + 1) say where each
begins and the last ends. Each starts from its own state, 0 if none is handed in, and leaves its
own. What others hold, NaN included, does not reach it; one without tokens hands its state through.

Complexity
----------
A token costs :math:`O(N)` where B and C have the structure of S4 to S12, :math:`O(N dv)` in S1 as
it stands. S2 is quadratic in tokens and there to be looked at.

Paper and code
--------------
The mappings follow the paper; which gauge its lemmas print was not compared, each identity is
derived again here. The code keeps A negative, here it is positive, as in the paper. Softmax is
masked with -10000 there, with -inf here. The experiments use one head; softplus and sigmoid were
tried for :math:`\eta` in S7 and lost to exp. S12 is written from general knowledge of that model.
``from_*`` return D as zeros where the paper has none (ours). The authors' layer has dropout, ours
has none.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_shaped
from attnspec.reference.linear.dsf_batches import (
    linear_attention_packed,
    linear_attention_packed_backward,
    s6_packed,
    s6_packed_backward,
    ssd_packed,
    ssd_packed_backward,
)
from attnspec.reference.linear.dsf_layer import qlstm_layer, qlstm_layer_backward
from attnspec.reference.linear.dsf_maps import (
    from_attention,
    from_normalised_attention,
    from_qlstm,
    from_rg_lru,
    from_s6,
    from_ssd,
    taylor_features,
)
from attnspec.reference.linear.dsf_mixers import (
    linear_attention,
    linear_attention_backward,
    normalised_attention,
    normalised_attention_backward,
    softmax_attention,
    softmax_attention_backward,
)
from attnspec.reference.linear.dsf_recall import mqar_accuracy, mqar_batch, mqar_sequences
from attnspec.reference.linear.dsf_recurrence import (
    elementwise_scan,
    elementwise_scan_backward,
)
from attnspec.reference.linear.dsf_rnn import (
    qlstm,
    qlstm_backward,
    rg_lru,
    rg_lru_backward,
)
from attnspec.reference.linear.dsf_rnn_batches import (
    qlstm_packed,
    qlstm_packed_backward,
    rg_lru_packed,
    rg_lru_packed_backward,
)
from attnspec.reference.linear.dsf_ssm import (
    is_ssd,
    s6_scan,
    s6_scan_backward,
    ssd_as_attention,
    ssd_as_normalised,
    ssd_scan,
    ssd_scan_backward,
)
from attnspec.reference.linear.dsf_system import (
    check_system,
    dsf_matrix,
    dsf_scan_backward,
    gauge,
)
from attnspec.reference.spec import Coverage, Mechanism, Operation, Paper


def dsf_scan(
    Lam: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None,
    u: np.ndarray,
    h0: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S1: y (..., T, dv) and the last h (..., N).

    Lam (..., T, N), B (..., T, N, dv), C (..., T, dv, N), D (..., T, dv, dv) or None, u (..., T,
    dv), h0 (..., N) or None, which is 0.

    >>> one = np.ones((3, 1))
    >>> y, h = dsf_scan(one / 2, one[..., None], one[..., None], None, one)
    >>> y.ravel(), h
    (array([1.  , 1.5 , 1.75]), array([1.75]))
    """
    check_system(Lam, B, C, D)
    check_shaped("u", u, (*Lam.shape[:-1], B.shape[-1]))
    states, last = elementwise_scan(Lam, np.einsum("...nv,...v->...n", B, u), h0)
    y = np.einsum("...vn,...n->...v", C, states)
    return (y if D is None else y + np.einsum("...wv,...v->...w", D, u)), last


MECHANISM = Mechanism(
    title="Dynamical Systems Framework",
    idea="Attention, state space models and gated RNNs are one system that decays and is read.",
    paper=Paper(
        title="Understanding the Differences in Foundation Models: Attention, State Space Models, "
        "and Recurrent Neural Networks",
        authors=("Jerome Sieber", "Carmen Amo Alonso", "Alexandre Didier", "Melanie N. Zeilinger",
                 "Antonio Orvieto"),
        year=2024,
        arxiv="2405.15731",
        venue="NeurIPS 2024",
        code="IntelligentControlSystems/dsf-mqar",
    ),
    operations=(
        Operation(dsf_scan, ("S1",), dsf_scan_backward, ("Lam", "B", "C", "D", "u", "h0")),
        Operation(dsf_matrix, ("S2",)),
        Operation(gauge, ("S3",)),
        Operation(from_attention, ("S4",)),
        Operation(taylor_features, ("S6",)),
        Operation(from_normalised_attention, ("S7",)),
        Operation(from_s6, ("S8",)),
        Operation(from_ssd, ("S9",)),
        Operation(from_qlstm, ("S10", "S11")),
        Operation(from_rg_lru, ("S12",)),
        Operation(softmax_attention, ("S6",), softmax_attention_backward, ("q", "k", "v")),
        Operation(
            linear_attention, ("S5",), linear_attention_backward, ("q", "k", "v", "state")
        ),
        Operation(
            normalised_attention, ("S7",), normalised_attention_backward,
            ("q", "k", "v", "n", "h0"),
        ),
        Operation(
            s6_scan, ("S8",), s6_scan_backward, ("Delta", "A", "b", "c", "u", "D", "h0")
        ),
        Operation(
            ssd_scan, ("S9", "S13"), ssd_scan_backward, ("Delta", "a", "b", "c", "u", "h0")
        ),
        Operation(
            linear_attention_packed, ("S5", "S18"), linear_attention_packed_backward,
            ("q", "k", "v", "state"),
        ),
        Operation(
            s6_packed, ("S8", "S18"), s6_packed_backward,
            ("Delta", "A", "b", "c", "u", "D", "h0"),
        ),
        Operation(
            ssd_packed, ("S9", "S18"), ssd_packed_backward, ("Delta", "a", "b", "c", "u", "h0")
        ),
        Operation(
            qlstm_packed, ("S11", "S18"), qlstm_packed_backward,
            ("f", "i", "o", "z", "alpha", "h0"),
        ),
        Operation(
            rg_lru_packed, ("S12", "S18"), rg_lru_packed_backward,
            ("u", "r", "g", "lam", "h0"),
        ),
        Operation(ssd_as_attention, ("S13",)),
        Operation(ssd_as_normalised, ("S14",)),
        Operation(is_ssd, ("S14", "S15")),
        Operation(
            qlstm, ("S10", "S11"), qlstm_backward, ("f", "i", "o", "z", "alpha", "h0")
        ),
        Operation(
            qlstm_layer, ("S11",), qlstm_layer_backward,
            ("x", "input_weight", "conv_weight", "conv_bias", "gates_weight", "gates_bias",
             "output_weight", "alpha", "state"),
        ),
        Operation(rg_lru, ("S12",), rg_lru_backward, ("u", "r", "g", "lam", "h0")),
        Operation(
            elementwise_scan, ("S16",), elementwise_scan_backward, ("a", "x", "h0")
        ),
        Operation(mqar_sequences, ("S17",)),
        Operation(mqar_batch, ("S17",)),
        Operation(mqar_accuracy, ("S17",)),
    ),
    headline="dsf_scan",
    coverage=Coverage(
        patterns=("causal self",),
        phases=("prefill", "step by step", "chunked"),
        paddings=("none", "packed"),
        heads=("MHA",),
        gradient=True,
    ),
)  # fmt: skip
