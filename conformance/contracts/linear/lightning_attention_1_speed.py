"""Benchmarks of TransNormerLLM: its layer at the sizes of the 1B and 7B models, and its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import bytes_of
from attnspec.conformance.bench.model import Benchmark, Cost, Rival, Unavailable
from attnspec.conformance.bench.rivals import with_backward

BASE = 10000.0


def _layer(batch: int, tokens: int, D: int, H: int, lrpe: bool, cached: bool = False) -> Any:
    """x, weights and, if `cached`, a state with the position behind it."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Any:
            x = torch.randn(shape, generator=generator, device=device)
            return (x / shape[-2] ** 0.5).to(getattr(torch, dtype))

        head = torch.arange(1, H + 1, device=device, dtype=torch.float32)
        place = torch.arange(D, device=device, dtype=torch.float32)
        params = {
            "Wqkvu": random(D, 4 * D),
            "Wo": random(D, D),
            "slopes": 2.0 ** (-8.0 * head / H),
            "theta": (BASE ** (-2.0 * place / D)).reshape(H, D // H) if lrpe else None,
        }
        made = {"x": random(batch, tokens, D) * tokens**0.5, "params": params}
        if cached:
            width = (2 if lrpe else 1) * D // H
            state = torch.randn((batch, H, width, D // H), generator=generator, device=device)
            made |= {"state": state, "offset": 512}
        return made

    return make


def layer_cost(factor: float = 1.0) -> Any:
    """x, the weights and states in, y out; the two products and two with the state a token."""

    def cost(arguments: Mapping[str, Any]) -> Cost:
        x, params, state = arguments["x"], arguments["params"], arguments.get("state")
        batch, tokens, D = x.shape
        d = D // params["slopes"].shape[0] * (1 if params["theta"] is None else 2)
        moved = 2 * bytes_of(x) + bytes_of(params["Wqkvu"], params["Wo"])
        if state is not None:
            moved += 2 * bytes_of(state)
        return Cost(2.0 * batch * tokens * (5 * D * D + 2 * D * d) * factor, moved * factor)

    return cost


def _leaves(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    return arguments["x"], arguments["params"]["Wqkvu"], arguments["params"]["Wo"]


def layer_and_gradients(
    function: Callable[..., Any], arguments: Mapping[str, Any]
) -> Callable[[], Any]:
    """The timed call: the layer and the gradients of its input and both matrices."""
    return with_backward(lambda: function(**arguments), _leaves(arguments))


def softmax_layer(backward: bool = False) -> Rival:
    """What the paper holds the layer against: as many products around a causal softmax."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        x, W, Wo = _leaves(arguments)
        H = arguments["params"]["slopes"].shape[0]
        attention = torch.nn.functional.scaled_dot_product_attention

        def forward() -> Any:
            q, k, v, u = (x @ W).chunk(4, -1)
            q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in (q, k, v))
            o = attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            return (o * u) @ Wo

        return with_backward(forward, (x, W, Wo)) if backward else forward

    return Rival("softmax layer (SDPA)", prepare)


def _torch_layer(x: Any, W: Any, Wo: Any, slopes: Any, theta: Any, block: int = 128) -> Any:
    """The layer in plain torch, by blocks; the tokens are a multiple of `block`."""
    import torch

    silu = torch.nn.functional.silu
    tokens, D = x.shape[1:]
    H = slopes.shape[0]
    q, k, v, u = (x @ W).chunk(4, -1)
    q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in (silu(q), silu(k), v))
    if theta is not None:
        angle = torch.arange(tokens, device=x.device)[:, None] * theta[:, None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        q, k = (torch.cat([y * cos, y * sin], -1) for y in (q, k))
    q, k, v = (y.unflatten(2, (-1, block)) for y in (q, k, v))
    row = torch.arange(block, device=x.device)
    s = slopes[:, None, None]
    gap = row[:, None] - row
    mask = torch.where(gap >= 0, torch.exp(-s * gap), 0.0).to(x.dtype)[:, None]
    fall = torch.exp(-s * (row[:, None] + 1)).to(x.dtype)[:, None]
    rise = torch.exp(-s * (block - 1 - row[:, None])).to(x.dtype)[:, None]
    written = ((rise * k).mT @ v).float()
    through = torch.exp(-s * block)
    state, entering = torch.zeros_like(written[:, :, 0]), []
    for n in range(written.shape[2]):
        entering.append(state)
        state = through * state + written[:, :, n]
    carried = (fall * q) @ torch.stack(entering, 2).to(x.dtype)
    o = (carried + ((q @ k.mT) * mask) @ v).flatten(2, 3).transpose(1, 2).flatten(2)
    return (torch.nn.functional.rms_norm(o, (D,), eps=1e-6) * u) @ Wo


def torch_layer(backward: bool = False, compiled: bool = True) -> Rival:
    """The same layer in torch, compiled unless told otherwise."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        if arguments["x"].shape[1] % 128:
            raise Unavailable("the torch form wants whole blocks of 128 tokens")
        leaves, params = _leaves(arguments), arguments["params"]
        x, W, Wo = leaves
        layer = torch.compile(_torch_layer) if compiled else _torch_layer

        def forward() -> Any:
            return layer(x, W, Wo, params["slopes"], params["theta"])

        return with_backward(forward, leaves) if backward else forward

    return Rival("torch.compile" if compiled else "torch", prepare)


def torch_step(compiled: bool) -> Rival:
    """One token in torch, eager or captured by torch.compile."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        x, W, Wo = _leaves(arguments)
        state, slopes = arguments["state"], arguments["params"]["slopes"]
        H = slopes.shape[0]

        def step(x: Any, state: Any) -> Any:
            silu = torch.nn.functional.silu
            q, k, v, u = (x @ W).chunk(4, -1)
            q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in (silu(q), silu(k), v))
            new = torch.exp(-slopes)[:, None, None] * state + (k.mT * v).float()
            o = (q.float() @ new).transpose(1, 2).flatten(2)
            return (torch.nn.functional.rms_norm(o, o.shape[-1:], eps=1e-6).to(x.dtype) * u) @ Wo

        run = torch.compile(step) if compiled else step
        return lambda: run(x, state)

    return Rival("torch.compile" if compiled else "torch", prepare)


def torch_norm(compiled: bool) -> Rival:
    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        x = arguments["x"]

        def forward(x: Any) -> Any:
            return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)

        run = torch.compile(forward) if compiled else forward
        return lambda: run(x)

    return Rival("torch.compile" if compiled else "torch", prepare)


def torch_lift() -> Rival:
    """The lift in torch, compiled, angles included."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        x, theta = arguments["x"], arguments["theta"]

        def forward(x: Any, theta: Any) -> Any:
            angle = torch.arange(x.shape[2], device=x.device)[:, None] * theta[:, None]
            return torch.cat([x * angle.cos(), x * angle.sin()], -1).to(x.dtype)

        run = torch.compile(forward)
        return lambda: run(x, theta)

    return Rival("torch.compile", prepare)


def layer(
    device: str, tokens: int, D: int, H: int, rivals: Any, *, backward: bool = False,
    lrpe: bool = False, batch: int = 1, cached: bool = False,
) -> Benchmark:  # fmt: skip
    what = "one token" if cached else f"{tokens // 1024}k tokens"
    name = f"{what} D={D}" + (" LRPE" if lrpe else "") + (" forward+backward" if backward else "")
    return Benchmark(
        "lightning_attention_1.tnl_gla",
        name,
        device,
        _layer(batch, tokens, D, H, lrpe, cached),
        layer_cost(3.0 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=layer_and_gradients if backward else None,
        rivals=rivals,
        settings={"tokens": tokens, "D": D, "heads": H, "batch": batch},
    )


def _rows(arguments: Mapping[str, Any]) -> Cost:
    x, theta = arguments["x"], arguments.get("theta")
    return Cost(4.0 * x.numel(), bytes_of(x) * (2 if theta is None else 3))


def _norm_rows(device: str, dtype: str) -> dict[str, Any]:
    return {"x": _layer(1, 16384, 2048, 16, False)(device, dtype)["x"]}


def _lift_rows(device: str, dtype: str) -> dict[str, Any]:
    made = _layer(1, 16384, 2048, 16, True)(device, dtype)
    x = made["x"].unflatten(-1, (16, -1)).transpose(1, 2)
    return {"x": x, "theta": made["params"]["theta"]}


STEP = layer("cuda", 1, 4096, 32, (torch_step(False), torch_step(True)), batch=64, cached=True)
BENCHMARKS = (
    layer("cuda", 2048, 2048, 16, (torch_layer(), softmax_layer())),
    layer("cuda", 8192, 2048, 16, (torch_layer(), softmax_layer())),
    layer("cuda", 32768, 2048, 16, (softmax_layer(),)),
    layer("cuda", 131072, 2048, 16, (softmax_layer(),)),
    layer("cuda", 1048576, 2048, 16, ()),
    layer("cuda", 8192, 2048, 16, (torch_layer(), softmax_layer()), lrpe=True),
    layer("cuda", 8192, 2048, 16, (torch_layer(True), softmax_layer(True)), backward=True),
    layer("cuda", 32768, 2048, 16, (softmax_layer(True),), backward=True),
    STEP,
    STEP.in_a_graph(),
    Benchmark(
        "lightning_attention_1.srms_norm", "16k rows D=2048", "cuda", _norm_rows, _rows,
        rivals=(torch_norm(False), torch_norm(True)), settings={"tokens": 16384, "D": 2048},
    ),
    Benchmark(
        "lightning_attention_1.lrpe", "16k tokens d=128", "cuda", _lift_rows, _rows,
        rivals=(torch_lift(),), settings={"tokens": 16384, "d": 128, "heads": 16},
    ),
    layer("cpu", 4096, 512, 8, (torch_layer(compiled=False), softmax_layer())),
)  # fmt: skip
