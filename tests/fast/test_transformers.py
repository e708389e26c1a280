"""Models of the transformers library with our attention, against the library's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from attnspec import fast
from attnspec.fast.backend import launch_count
from attnspec.fast.transformers.plans import make_plan
from attnspec.reference.cache.streaming_llm import sink_window_mask
from attnspec.reference.patterns.longlora import s2_mask
from attnspec.reference.patterns.sinklora import sf_mask

transformers = pytest.importorskip("transformers", minversion="5.0")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}
SINKS, WINDOW = 2, 5
TOKENS = 23
GROUP = 6
HEADS = SIZES["num_attention_heads"]
GROUPS = {
    "test-s2": s2_mask(TOKENS, GROUP, HEADS),
    "test-sf": sf_mask(TOKENS, GROUP, HEADS, s=SINKS),
}


@pytest.fixture(scope="module", autouse=True)
def names() -> list[str]:
    registered = fast.transformers.register()
    registered += fast.transformers.register(
        "test-streaming", mechanism="streaming_llm", sinks=SINKS, window=WINDOW
    )
    registered += fast.transformers.register("test-tempscale", mechanism="tempscale", tau=0.5)
    registered += fast.transformers.register("test-s2", mechanism="longlora", G=GROUP)
    registered += fast.transformers.register("test-sf", mechanism="sinklora", G=GROUP, s=SINKS)
    return registered


def decoder(implementation: str, kind: str = "Llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 128, **changes}
    config = getattr(transformers, f"{kind}Config")(
        **settings, bos_token_id=None, eos_token_id=None, pad_token_id=0
    )
    config._attn_implementation = implementation
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def encoder(implementation: str) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0
    )
    config._attn_implementation = implementation
    return transformers.BertModel(config).eval()


def batch(rows: int = 3, tokens: int = TOKENS, side: str = "left") -> dict[str, torch.Tensor]:
    """Sequences of different lengths, padded on one side."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, SIZES["vocab_size"], (rows, tokens), generator=generator)
    real = torch.ones(rows, tokens, dtype=torch.long)
    for row in range(rows):
        missing = slice(0, 4 * row) if side == "left" else slice(tokens - 4 * row, tokens)
        real[row, missing] = 0
    return {"input_ids": ids * real, "attention_mask": real}


def real_logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    found = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found[inputs["attention_mask"].bool()]


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_decoders_give_the_same_logits(kind: str, side: str) -> None:
    inputs = batch(1 if side == "none" else 3, side=side)
    before = launch_count()
    got = real_logits(decoder("attnspec", kind), inputs)
    assert launch_count() == before + SIZES["num_hidden_layers"]
    for own in ("eager", "sdpa"):
        assert_equal(got, real_logits(decoder(own, kind), inputs))


@pytest.mark.parametrize("side", ["none", "right"])
def test_encoders_give_the_same_states(side: str) -> None:
    inputs = batch(1 if side == "none" else 3, side=side)
    got = real_logits(encoder("attnspec"), inputs)
    for own in ("eager", "sdpa"):
        assert_equal(got, real_logits(encoder(own), inputs))


def test_a_sliding_window_is_the_models_own() -> None:
    inputs = batch()
    got, expected = (
        real_logits(decoder(name, "Mistral", sliding_window=7), inputs)
        for name in ("attnspec", "sdpa")
    )
    assert_equal(got, expected)


def test_packed_sequences_stay_apart() -> None:
    ids = batch(1)["input_ids"]
    positions = torch.cat([torch.arange(9), torch.arange(TOKENS - 9)])[None]
    packed, alone = decoder("attnspec"), decoder("sdpa")
    with torch.no_grad():
        got = packed(ids, position_ids=positions, use_cache=False).logits
        first, second = (alone(part).logits for part in (ids[:, :9], ids[:, 9:]))
    assert_equal(got, torch.cat([first, second], dim=1))


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    settings = {"max_new_tokens": 12, "do_sample": False, **options}
    return model.generate(**inputs, **settings).tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("rows", [1, 3])
def test_generation_gives_the_same_tokens(rows: int, cache: str) -> None:
    inputs, options = batch(rows), {"cache_implementation": cache}
    if cache == "static":
        options["disable_compile"] = True
    got = generate(decoder("attnspec"), inputs, **options)
    assert got == generate(decoder("sdpa"), inputs, **options)


@pytest.mark.filterwarnings("ignore:`past_key_values`:FutureWarning")
def test_chunks_of_a_prompt_continue_the_cache() -> None:
    model, inputs = decoder("attnspec"), batch(1)
    ids = inputs["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :3], use_cache=True)
        rest = model(ids[:, 3:], past_key_values=first.past_key_values)
    assert_equal(torch.cat([first.logits, rest.logits], dim=1), whole)


@pytest.mark.parametrize("implementation", ["attnspec", "test-streaming"])
def test_a_training_step_has_the_same_gradients(implementation: str) -> None:
    gradients = []
    for name in (implementation, "sdpa"):
        model = decoder(name).train()
        inputs = batch(2, side="right")
        if implementation == "test-streaming" and name == "sdpa":
            inputs["attention_mask"] = pattern(inputs)
        real = batch(2, side="right")["attention_mask"].bool()
        labels = inputs["input_ids"].masked_fill(~real, -100)
        model(**inputs, labels=labels).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-3, atol=1e-6, msg=name)


def pattern(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The chapter's sinks and window in each row's real tokens, as a whole mask for sdpa."""
    rows = []
    for real in inputs["attention_mask"].bool().numpy():
        places = np.flatnonzero(real)
        seen = np.zeros((TOKENS, TOKENS), bool)
        seen[np.ix_(places, places)] = sink_window_mask(len(places), S=SINKS, R=WINDOW - 1)
        rows.append(seen)
    return torch.from_numpy(np.stack(rows))[:, None]


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_streaming_is_sinks_and_a_window(side: str) -> None:
    inputs = batch(1 if side == "none" else 3, side=side)
    real = inputs["attention_mask"].bool()
    # The library derives no positions from a whole mask.
    positions = {"position_ids": (real.long().cumsum(-1) - 1).clamp(min=0)}
    got = real_logits(decoder("test-streaming"), inputs | positions)
    with torch.no_grad():
        masked = {**inputs, **positions, "attention_mask": pattern(inputs)}
        expected = decoder("sdpa")(**masked).logits[real]
    assert_equal(got, expected)
    assert not torch.allclose(got, real_logits(decoder("sdpa"), inputs | positions), atol=1e-2)


@pytest.mark.parametrize("rows", [1, 3])
def test_streaming_generates_as_it_reads(rows: int) -> None:
    """Every token generated with a cache is what a forward pass over all tokens would choose."""
    model, inputs = decoder("test-streaming"), batch(rows)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    real = torch.nn.functional.pad(inputs["attention_mask"], (0, 8), value=1)
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=real, position_ids=positions, use_cache=False).logits
    assert logits[:, -9:-1].argmax(-1).tolist() == ids[:, -8:].tolist()


def test_any_plain_mechanism_can_be_registered() -> None:
    inputs = batch()
    got = real_logits(decoder("test-tempscale"), inputs)
    sharper = decoder("sdpa")
    for layer in sharper.model.layers:
        layer.self_attn.scaling /= 0.5
    assert_equal(got, real_logits(sharper, inputs))


@pytest.mark.parametrize("name", GROUPS)
def test_groups_train_and_dense_attention_reads(name: str) -> None:
    """Loss and gradients of grouped attention, then logits of the same model without groups."""
    ids = batch(2)["input_ids"]
    found = []
    for implementation, mask in (
        (name, {}), ("sdpa", {"attention_mask": torch.from_numpy(GROUPS[name])[None]}),
    ):  # fmt: skip
        model = decoder(implementation).train()
        loss = model(ids, labels=ids, **mask).loss
        loss.backward()
        found.append({"loss": loss, **{n: p.grad for n, p in model.named_parameters()}})
    for what, expected in found[1].items():
        torch.testing.assert_close(found[0][what], expected, rtol=1e-3, atol=1e-6, msg=what)
    model = decoder(name)
    model.set_attn_implementation("attnspec")
    inputs = batch(2)
    assert_equal(real_logits(model, inputs), real_logits(decoder("sdpa"), inputs))


def test_what_an_operation_lacks_is_said() -> None:
    assert not make_plan("longlora", {"G": 4}).takes_mask
    assert not make_plan("longlora.grouped_attend", {"G": 4, "variant": "roll"}).takes_padding
    with pytest.raises(ValueError, match=r"longlora\.grouped_attend with G$"):
        make_plan("longlora.grouped_attend", {})


def test_switching_a_model_over() -> None:
    model, inputs = decoder("sdpa"), batch()
    expected = real_logits(model, inputs)
    model.set_attn_implementation("attnspec")
    assert_equal(real_logits(model, inputs), expected)


def layer(implementation: str, **options: Any) -> Any:
    call = transformers.AttentionInterface()[implementation]
    q, k = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 3, 8)
    return call(torch.nn.Module(), q, k, k, **{"attention_mask": None, **options})


def register(*args: Any, **options: Any) -> list[str]:
    return fast.transformers.register(*args, **options)


MANY = torch.ones(2, 1, 3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: layer("attnspec", dropout=0.1), ValueError, "dropout"),
        (lambda: layer("attnspec", softcap=50.0), ValueError, "softcap"),
        (lambda: layer("attnspec", output_attentions=True), ValueError, "output_attentions"),
        (lambda: layer("attnspec", s_aux=torch.zeros(4)), ValueError, "s_aux"),
        (lambda: layer("attnspec", position_bias=MANY.float()), ValueError, "position_bias"),
        (lambda: layer("attnspec", attention_mask=MANY.float()), TypeError, "attention_mask"),
        (lambda: layer("attnspec", attention_mask=MANY[..., :2]), ValueError, "attention_mask"),
        (lambda: layer("attnspec", attention_mask=MANY[0, 0]), ValueError, "attention_mask"),
        (lambda: layer("attnspec", cu_seq_lens_q=torch.arange(2)), ValueError, "cu_seq_lens_q"),
        (lambda: layer("attnspec_streaming", is_causal=False), ValueError, "is_causal"),
        (lambda: layer("attnspec_streaming", attention_mask=MANY), ValueError, "attention_mask"),
        (lambda: layer("test-tempscale", scaling=-1.0), ValueError, "scale"),
        (lambda: register(mechanism="streaming_llm"), ValueError, "name"),
        (lambda: register("sdpa"), ValueError, "name"),
        (lambda: register("flash"), ValueError, "name"),
        (lambda: register(""), ValueError, "name"),
        (lambda: register(3), TypeError, "name"),
        (lambda: register("mine", mechanism="nothing"), ValueError, "mechanism"),
        (lambda: register("mine", mechanism="snapkv"), ValueError, "mechanism"),
        (lambda: register("mine", mechanism="tempscale.attend"), ValueError, "mechanism"),
        (lambda: register("mine", mechanism="longlora"), ValueError, "mechanism"),
        (lambda: register("mine", mechanism="longlora", G=4, s=4), TypeError, "s"),
        (lambda: register("mine", tau=0.5), TypeError, "tau"),
        (lambda: register("mine", mechanism="tempscale", sinks=4), TypeError, "sinks"),
        (lambda: register("mine", mechanism="streaming_llm", R=4), TypeError, "R"),
        (lambda: register("mine", mechanism="streaming_llm", window=0), ValueError, "window"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=f"^{argument}: got "):
        call()
    assert "mine" not in transformers.AttentionInterface().valid_keys()


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: decoder("attnspec", "Gemma2", head_dim=8)(**batch()), "softcap"),
        (lambda: decoder("attnspec", attention_dropout=0.1).train()(**batch()), "dropout"),
        (lambda: decoder("attnspec")(**batch(), output_attentions=True), "output_attentions"),
        (lambda: decoder("test-s2")(**batch(side="right")), "attention_mask"),
        (lambda: generate(decoder("test-sf"), batch(1)), "k"),
        (lambda: encoder("attnspec_streaming")(**batch(side="right")), "is_causal"),
        (
            lambda: decoder("attnspec_streaming", "Mistral", sliding_window=7)(**batch()),
            "attention_mask",
        ),
        (
            lambda: generate(decoder("attnspec_streaming"), batch(), cache_implementation="static"),
            "attention_mask",
        ),
    ],
)
def test_models_that_need_more_are_refused(call: Callable[[], Any], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: "):
        call()


def test_a_missing_library_is_one_sentence() -> None:
    script = """
import sys
sys.modules["transformers"] = None
from attnspec import fast
try:
    fast.transformers.register()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == (
        'transformers is not installed: pip install "attnspec[transformers]"'
    )
