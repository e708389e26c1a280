"""Wrong kernels of `dsf`: ratios of products, normalisers upside down, gates without limits."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.linear import dsf_layer, dsf_maps, dsf_mixers, dsf_rnn
from attnspec.reference.linear.dsf_recurrence import softplus

SCAN = right("dsf.dsf_scan")
MATRIX = right("dsf.dsf_matrix")
GAUGE = right("dsf.gauge")
STEPS = right("dsf.elementwise_scan")
ATTENTION = right("dsf.from_attention")
S6_MAP = right("dsf.from_s6")
QLSTM_MAP = right("dsf.from_qlstm")
SSD_MAP = right("dsf.from_ssd")
TAYLOR = right("dsf.taylor_features")
LINEAR = right("dsf.linear_attention")
NORMALISED = right("dsf.normalised_attention")
SOFTMAX = right("dsf.softmax_attention")
S6 = right("dsf.s6_scan")
SSD = right("dsf.ssd_scan")
QLSTM = right("dsf.qlstm")
LAYER = right("dsf.qlstm_layer")
LRU = right("dsf.rg_lru")
SEQUENCES = right("dsf.mqar_sequences")
AS_ATTENTION = right("dsf.ssd_as_attention")
AS_NORMALISED = right("dsf.ssd_as_normalised")
IS_SSD = right("dsf.is_ssd")


def by_ratios(Lam: Any, B: Any, C: Any, D: Any = None) -> np.ndarray:
    """Products of decays as ratios of cumulative ones: 0 / 0 behind a reset."""
    Phi = MATRIX(Lam, B, C, D)
    with np.errstate(all="ignore"):
        total = np.cumprod(Lam, axis=-2)
        bad = (total / total).sum(axis=-1)
    return (Phi * np.where(np.isnan(bad), np.nan, 1)[..., :, None, None, None]).astype(Phi.dtype)


def upside_down(phi_q: Any, psi_k: Any, eta: Any, dv: int, form: int = 2) -> Any:
    """eta_i / eta_(i-1) in the place of its inverse."""
    Lam, B, C, D = ATTENTION(phi_q, psi_k, eta, dv, form)
    return 1 / Lam, B, C, D


def divides_by_the_last(phi_q: Any, psi_k: Any, eta: Any, dv: int, form: int = 2) -> Any:
    """Form 1 divides B by the normaliser of the token before."""
    Lam, B, C, D = ATTENTION(phi_q, psi_k, eta, dv, form)
    return (Lam, B / Lam[..., None], C, D) if form == 1 else (Lam, B, C, D)


def growing(system: Any) -> Any:
    """A decay's sign is turned, as if A were stored negative."""
    Lam, *rest = system
    return (1 / Lam, *rest)


def softplus_twice(arguments: dict[str, Any]) -> None:
    arguments["Delta"] = softplus(arguments["Delta"])


def exact_hold(Delta: Any, A: Any, b: Any, u: Any) -> Any:
    """b enters by the exact integral instead of Euler's rule."""
    decay = np.exp(-Delta[..., None] * A)
    rate = np.where(A == 0, Delta[..., None], (1 - decay) / np.where(A == 0, 1, A))
    return decay, rate * u[..., None] * b[..., None, :]


def without_relu(f: Any, alpha: float = 1.0, reversed: bool = False) -> Any:
    """A negative exponent grows the state."""
    return dsf_rnn.sigmoid_power(-f, alpha) if reversed else dsf_rnn.sigmoid_power(f)


def never_reversed(arguments: dict[str, Any]) -> None:
    arguments["reversed"] = False


def positive_features(arguments: dict[str, Any]) -> None:
    """Normalised attention is given the features of linear attention."""
    for name in "qk":
        arguments[name] = dsf_mixers.feature_map(arguments[name])


def own_sum(arguments: dict[str, Any]) -> None:
    """The normaliser is the sum of weights."""
    q, k = arguments["q"], arguments["k"]
    s = np.abs(np.einsum("...i,...i->...", q, np.cumsum(k, axis=-2)))
    arguments["n"] = np.log(np.maximum(s, 1e-3)).astype(q.dtype)


def skips_normaliser(q: Any, k: Any, v: Any, state: Any = None) -> Any:
    """A state's sum of features is not carried into eta."""
    if state is None:
        return LINEAR(q, k, v)
    y, _ = LINEAR(q, k, v, (state[0], 0 * state[1]))
    return y, LINEAR(q, k, v, state)[1]


def elu_only(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) + np.exp(np.minimum(x, 0)) - 0.5


def padded_right(seen: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The convolution is centred: it looks ahead."""
    width = weight.shape[-1]
    late = np.concatenate([seen[..., 1:, :], 0 * seen[..., :1, :]], axis=-2)
    return CONVOLUTION(late if width > 1 else seen, weight, bias)


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.1 * x**3)))


def swapped_gates(arguments: dict[str, Any]) -> None:
    """The gate projection is read as [i | f | o]."""
    hidden = arguments["conv_weight"].shape[0]
    for name in ("gates_weight", "gates_bias"):
        f, i, o = np.split(arguments[name], 3) if hidden else 3 * [arguments[name]]
        arguments[name] = np.concatenate([i, f, o])


def one_late(result: Any) -> Any:
    """A label one position behind its query."""
    inputs, labels = result
    return inputs, np.roll(labels, 1, axis=1)


def fillers_count(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Every position counts, labelled or not."""
    share = np.mean(np.argmax(logits, -1) == labels) if labels.size else np.nan
    return np.asarray(share, logits.dtype)


def reset_is_kept(arguments: dict[str, Any]) -> None:
    """A decay of 0 is clamped, as log decays are."""
    a = arguments["a"]
    arguments["a"] = np.where(a == 0, np.full_like(a, 0.05), a)


def log_decays(arguments: dict[str, Any]) -> None:
    """Decays are kept as logs: their sign is lost."""
    arguments["Lam"] = np.abs(arguments["Lam"])


def without_order(chosen: tuple[int, ...]) -> int:
    """Packed features forget how often a product occurs."""
    return 1


def double_rate(arguments: dict[str, Any]) -> None:
    arguments["a"] = 2 * arguments["a"]


def not_strict(eta: Any, psi: Any = None) -> Any:
    return IS_SSD(eta)


def decays_twice(Lam: Any, psi: Any, phi: Any, dv: int) -> Any:
    return SEPARABLE(Lam * Lam, psi, phi, dv)


def without_root(r: Any, g: Any, lam: Any, c: float) -> Any:
    """The input is not scaled by what the decay leaves."""
    return RATES(r, g, lam, c)[0], dsf_rnn.sigmoid_power(g)


CONVOLUTION = dsf_layer.causal_convolution
SEPARABLE = dsf_maps._separable
RATES = dsf_rnn.rg_lru_gates


def mutant(name: str, call: Any, law: str, bug: str) -> Mutant:
    operation, _, short = name.partition(":")
    return Mutant(f"dsf.{short}", f"dsf.{operation}", law, bug, call)


MUTANTS = (
    mutant("dsf_matrix:ratios", by_ratios, "dsf-matrix", "Ratios of cumulative products."),
    mutant("dsf_matrix:late-matrix", replacing(MATRIX, check_system=lambda *a: None),
           "refusal", "No argument is checked."),
    mutant("gauge:inverted", altering(GAUGE, lambda a: a.update(T=1 / a["T"])), "agreement",
           "The gauge is applied the other way round."),
    mutant("gauge:one-sided", spoiling(GAUGE, lambda r: (r[0], r[1], r[2] * 2)), "dsf-matrix",
           "C is not divided by all of T."),
    mutant("dsf_scan:log-decays", altering(SCAN, log_decays), "agreement",
           "Decays below 0 lose their sign."),
    mutant("dsf_scan:no-start", altering(SCAN, lambda a: a.update(h0=None)), "stream",
           "The state handed in is ignored."),
    mutant("elementwise_scan:clamped", altering(STEPS, reset_is_kept), "agreement",
           "A decay of 0 does not reset."),
    mutant("from_attention:upside-down", upside_down, "dsf-map", "The ratio is upside down."),
    mutant("from_attention:last-eta", divides_by_the_last, "dsf-map",
           "B is divided by the normaliser before."),
    mutant("from_s6:turned-sign", spoiling(S6_MAP, growing), "agreement",
           "A is taken as if it were stored negative."),
    mutant("from_s6:softplus-twice", altering(S6_MAP, softplus_twice), "dsf-map",
           "softplus is applied twice."),
    mutant("from_ssd:half-coupled", replacing(SSD_MAP, _separable=decays_twice), "dsf-map",
           "Delta decays twice."),
    mutant("from_qlstm:no-relu", replacing(QLSTM_MAP, forget_gate=without_relu), "dsf-map",
           "relu(alpha) is left out."),
    mutant("taylor_features:no-orders", replacing(TAYLOR, _orders=without_order), "dsf-series",
           "Packed products are counted once."),
    mutant("softmax_attention:unscaled", replacing(SOFTMAX, default_scale=lambda d: 1.0),
           "agreement", "No scale."),
    mutant("linear_attention:no-normaliser", skips_normaliser, "stream",
           "The normaliser is not handed over."),
    mutant("linear_attention:elu", replacing(LINEAR, feature_map=elu_only), "agreement",
           "elu plus a half."),
    mutant("normalised_attention:positive", altering(NORMALISED, positive_features), "dsf-shift",
           "Features are made positive."),
    mutant("normalised_attention:own-sum", altering(NORMALISED, own_sum), "dsf-rows",
           "It is normalised by its own weights."),
    mutant("s6_scan:softplus-twice-in-scan", altering(S6, softplus_twice), "dsf-hold",
           "softplus is applied twice."),
    mutant("s6_scan:exact-hold", replacing(S6, _s6_system=exact_hold), "agreement",
           "b enters by the exact integral."),
    mutant("ssd_scan:uncoupled", replacing(SSD, ssd_as_attention=lambda Delta, a, b, c, u:
           (*AS_ATTENTION(Delta, a, b, c, u)[:2], u, AS_ATTENTION(Delta, a, b, c, u)[3])),
           "agreement", "Delta does not scale the input."),
    mutant("ssd_as_attention:growing", spoiling(AS_ATTENTION, lambda r: (*r[:3], -r[3])),
           "dsf-equal", "The log decay has the wrong sign."),
    mutant("ssd_as_normalised:double-rate", altering(AS_NORMALISED, double_rate),
           "dsf-equal", "The rate is doubled."),
    mutant("is_ssd:not-strict", not_strict, "agreement", "A standing eta may take inputs."),
    mutant("is_ssd:always", spoiling(IS_SSD, np.ones_like), "dsf-turned", "Everything is an SSD."),
    mutant("qlstm:growing-state", replacing(QLSTM, forget_gate=without_relu), "dsf-gates",
           "relu(alpha) is left out."),
    mutant("qlstm:plain", altering(QLSTM, never_reversed), "agreement",
           "The reversed gate is the plain one."),
    mutant("qlstm_layer:looks-ahead", replacing(LAYER, causal_convolution=padded_right), "prefix",
           "The convolution is padded on the right."),
    mutant("qlstm_layer:gates", altering(LAYER, swapped_gates), "agreement",
           "The gates come in another order."),
    mutant("qlstm_layer:rows", altering(LAYER, lambda a: a.update(
           state=a["state"] and (a["state"][0], 0 * a["state"][1]))), "stream",
           "The convolution starts afresh."),
    mutant("rg_lru:no-root", replacing(LRU, rg_lru_gates=without_root), "agreement",
           "The input is not scaled by the root."),
    mutant("mqar_sequences:late-label", spoiling(SEQUENCES, one_late), "agreement",
           "Labels stand one position late."),
    mutant("mqar_accuracy:fillers", fillers_count, "agreement", "Unlabelled positions count."),
)  # fmt: skip
