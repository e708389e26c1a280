"""Wrong kernels of Titans' steps, decoding, granular chunks and layouts."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.linear import titans_coefficients as coefficients
from attnspec.reference.linear import titans_layouts as layouts
from attnspec.reference.primitives.gelu import gelu

COEFFICIENTS = right("titans.titans_coefficients")
BACKWARD = coefficients.titans_coefficients_backward
STEP = right("titans.decode_step")
GRANULAR = right("titans.titans_chunk_granular")
GRAD = right("titans.memory_grad")
MEMORY = right("titans.mlp_memory")
SIZES = right("titans.token_step_sizes")
INPUTS = right("titans.token_inputs")
MAC, MAG, MAL = (right(f"titans.{name}") for name in ("mac_segment", "mag", "mal"))
mask_mac = layouts.titans_mask_mac


def carried_at_once(theta: Any, eta: Any, alpha: Any) -> Any:
    """A token's own rate of momentum multiplies its step already at that token."""
    of = COEFFICIENTS(theta, eta, alpha)
    own = np.where(np.eye(theta.shape[-1], dtype=bool), eta[..., None], np.ones_like(of.n))
    return of._replace(n=of.n * own)


def forgotten_at_once(theta: Any, eta: Any, alpha: Any) -> Any:
    """A gradient is forgotten already at its own token."""
    of = COEFFICIENTS(theta, eta, alpha)
    return of._replace(G=of.G * (1 - alpha)[..., None, :])


def by_quotients(theta: Any, eta: Any, alpha: Any) -> Any:
    """G through beta_t / beta_j, which is 0 / 0 behind a token that forgets all."""
    of = COEFFICIENTS(theta, eta, alpha)
    with np.errstate(all="ignore"):
        kept = of.beta[..., :, None] / of.beta[..., None, :]
        return of._replace(G=np.where(of.G == 0, of.G, of.G * (kept / kept)))


def momentum_undecayed(result: Any) -> Any:
    return result._replace(f=np.cumsum(result.m, axis=-1))


def never_renewed(state: Any, *args: Any, **options: Any) -> Any:
    """The gradient's weights stay those of the first chunk."""
    y, new = STEP(state, *args, **options)
    if state.pos == 0:
        return y, new
    return STEP(state._replace(pos=1), *args, **options)[0], new._replace(W_base=state.W_base)


def always_renewed(state: Any, *args: Any, **options: Any) -> Any:
    """Every token takes its gradient at the weights of the token before."""
    y, new = STEP(state, *args, **options)
    if state.pos == 0:
        return y, new
    y, fresh = STEP(state._replace(pos=0), *args, **options)
    return y, fresh._replace(pos=new.pos)


def position_starts_at_0(result: Any) -> Any:
    y, state = result
    return y, state._replace(pos=state.pos - 1)


def reads_its_own_chunk(*args: Any) -> Any:
    """Token t reads behind floor(t / c) + 1 chunks, its own if that is complete."""
    y, W, S, path = GRANULAR(*args)
    return np.concatenate([y[..., 1:, :], y[..., -1:, :]], axis=-2), W, S, path


def renewed_each_chunk(arguments: dict[str, Any]) -> None:
    if arguments["batch_size"] is None and type(arguments["c"]) is int and arguments["c"] >= 1:
        arguments["batch_size"] = arguments["c"]


def never_renewed_granules(arguments: dict[str, Any]) -> None:
    arguments["batch_size"] = None


def momentum_of_steps(theta: Any, eta: Any, alpha: Any) -> Any:
    """The step multiplies the whole momentum on its way into the weights."""
    of = COEFFICIENTS(np.ones_like(theta), eta, alpha)
    f, G, rows = 0 * of.f[..., :1].sum(axis=-1), 0 * of.G.sum(axis=-2), []
    for t in range(theta.shape[-1]):
        kept, step = 1 - alpha[..., t], theta[..., t]
        f = kept * f + step * of.m[..., t]
        G = kept[..., None] * G + step[..., None] * of.n[..., t, :]
        rows.append((f, G))
    if rows:
        f, G = np.stack([row[0] for row in rows], -1), np.stack([row[1] for row in rows], -2)
        of = of._replace(f=f, G=G)
    return of


def no_forgetting(arguments: dict[str, Any]) -> None:
    alpha = arguments["alpha"]
    if isinstance(alpha, np.ndarray) and np.all((alpha >= 0) & (alpha <= 1)):
        arguments["alpha"] = 0 * alpha


def bends_the_output(W: Any, x: np.ndarray) -> np.ndarray:
    """The activation follows the last layer as well."""
    return gelu(MEMORY(W, x))


def unbounded_steps(arguments: dict[str, Any]) -> None:
    arguments["theta_max"] = 1.0


def error_of_half(result: Any) -> Any:
    H, Delta = result
    return H, tuple(0.5 * x for x in Delta)


def looks_ahead(x: np.ndarray, W: np.ndarray, filters: Any = None, *,
                normalise: bool = True) -> np.ndarray:  # fmt: skip
    """The convolution is centred, not causal."""
    y = INPUTS(x, W, filters, normalise=normalise)
    past = 0 if filters is None else (len(filters) - 1) // 2
    return np.concatenate([y[..., past:, :], y[..., :past, :]], axis=-2)


def asks_the_future(T: int, C: int, N_p: int, tokenwise: bool = False) -> np.ndarray:
    return mask_mac(T, C, N_p, False)


def hides_memory(T: int, C: int, N_p: int, tokenwise: bool = False) -> np.ndarray:
    mask = mask_mac(T, C, N_p, tokenwise)
    mask[:, N_p : N_p + T] &= np.arange(T)[:, None] > 0
    return mask


def short_window(T: int, w: int) -> np.ndarray:
    """The own token does not count among the w."""
    age = np.arange(T)[:, None] - np.arange(T)
    return (age >= 0) & (age <= w)


def prefix_falls_out(T: int, w: int, N_p: int) -> np.ndarray:
    return layouts._window(T + N_p, w)


def unnormalised(y: np.ndarray, h: np.ndarray, gains: Any) -> np.ndarray:
    """What the memory says is not normalised before the gate."""
    layouts.check_gains(gains, y)
    opened = 1 / (1 + np.exp(-np.clip(h * gains[1], -80, 80)))
    return layouts._rms(y) * gains[0] * opened.astype(y.dtype)


def mutant(name: str, law: str, bug: str, call: Any, operation: str, **rest: Any) -> Mutant:
    return Mutant(f"titans.{name}", f"titans.{operation}", law, bug, call, **rest)


MUTANTS = (
    mutant("carried-at-once", "agreement", "eta_j multiplies theta_j at t = j", carried_at_once,
           "titans_coefficients"),
    mutant("forgotten-at-once", "agreement", "1 - alpha_j multiplies a gradient at t = j",
           forgotten_at_once, "titans_coefficients"),
    mutant("quotients", "agreement", "coefficients by quotients of beta", by_quotients,
           "titans_coefficients"),
    mutant("step-outside", "agreement", "theta multiplies the momentum, not the gradient",
           momentum_of_steps, "titans_coefficients"),
    mutant("undecayed", "agreement", "the first momentum does not fade from the weights",
           spoiling(COEFFICIENTS, momentum_undecayed), "titans_coefficients"),
    mutant("coefficients-gradient", "gradient", "the gradient of m is dropped", COEFFICIENTS,
           "titans_coefficients", backward=altering(
               BACKWARD, lambda a: a.update(dm=0 * a["dm"]))),
    mutant("bent-output", "agreement", "the activation follows the last layer too",
           bends_the_output, "mlp_memory"),
    mutant("half-error", "agreement", "the gradient of half the square", spoiling(
        GRAD, error_of_half), "memory_grad"),
    mutant("never-renewed", "stream", "decoding takes gradients at the first weights for ever",
           never_renewed, "decode_step"),
    mutant("always-renewed", "stream", "decoding takes gradients at the running weights",
           always_renewed, "decode_step"),
    mutant("position", "agreement", "the new token is not counted",
           spoiling(STEP, position_starts_at_0), "decode_step"),
    mutant("own-chunk", "agreement", "a token reads one chunk too many", reads_its_own_chunk,
           "titans_chunk_granular"),
    mutant("renewed", "agreement", "gradients are taken at each chunk's own weights",
           altering(GRANULAR, renewed_each_chunk), "titans_chunk_granular"),
    mutant("never-renewed-granules", "agreement", "granular gradients stay at the first weights",
           altering(GRANULAR, never_renewed_granules), "titans_chunk_granular"),
    mutant("no-forgetting", "agreement", "granular weights do not decay",
           altering(GRANULAR, no_forgetting), "titans_chunk_granular"),
    mutant("unbounded", "agreement", "theta_max is not applied",
           altering(SIZES, unbounded_steps), "token_step_sizes"),
    mutant("looks-ahead", "prefix", "the convolution is not causal", looks_ahead, "token_inputs"),
    mutant("future-memory", "prefix", "a row sees what later rows asked the memory",
           replacing(MAC, titans_mask_mac=asks_the_future), "mac_segment"),
    mutant("hidden-memory", "agreement", "the first row does not see the memory",
           replacing(MAC, titans_mask_mac=hides_memory), "mac_segment"),
    mutant("prefix-falls-out", "agreement", "persistent tokens leave the window",
           replacing(MAG, titans_mask_mag=prefix_falls_out), "mag"),
    mutant("raw-memory", "agreement", "the gate opens by unnormalised rows",
           replacing(MAG, gate=unnormalised), "mag"),
    mutant("raw-keys", "agreement", "keys and queries keep their length although asked not to",
           altering(MAG, lambda a: a.update(normalise=False)), "mag"),
    mutant("wide-window", "agreement", "a window of w keeps w + 1 keys",
           replacing(MAL, _window=short_window), "mal"),
)  # fmt: skip
