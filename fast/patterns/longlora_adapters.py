"""LongLoRA's adapters as modules of a model.

`adapt` puts an adapter beside every projection of attention, freezes what is not trained, and
`merge` folds the adapters into plain linear layers again::

    adapt(model)
    train(model)
    merge(model)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attnspec.fast.backend import check_integer
from attnspec.fast.patterns.longlora_tuning import is_trained, lora_forward, lora_merge

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter, in the layer's dtype.

    A starts as torch starts a linear layer, B at 0, so that the layer does at first what it did.
    """

    def __init__(
        self, base: nn.Linear, r: int = 8, alpha: float = 16.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_integer("r", r, least=1)
        self.base = base.requires_grad_(False)
        self.alpha, self.dropout = alpha, dropout
        weight = base.weight
        self.lora_A = nn.Parameter(weight.new_empty(r, weight.shape[1]))
        self.lora_B = nn.Parameter(weight.new_zeros(weight.shape[0], r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        keep = None
        if self.training and self.dropout > 0:
            keep = torch.rand(x.shape, device=x.device) >= self.dropout
        y = lora_forward(
            x, self.base.weight, self.lora_A, self.lora_B, self.alpha,
            keep=keep, dropout=self.dropout,
        )  # fmt: skip
        return y if self.base.bias is None else y + self.base.bias

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A linear layer that does the same without an adapter; the weights here stay as they are.

        In 16 bits the merged weights are rounded.
        """
        n_out, n_in = self.base.weight.shape
        bias = self.base.bias
        layer = nn.Linear(
            n_in, n_out, bias is not None, self.base.weight.device, self.base.weight.dtype
        )
        layer.weight.copy_(lora_merge(self.base.weight, self.lora_A, self.lora_B, self.alpha))
        if bias is not None:
            layer.bias.copy_(bias)
        return layer


def adapt(
    model: nn.Module,
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: tuple[str, ...] = TARGETS,
    trainable_params: str = "embed,norm",
) -> nn.Module:
    """Puts adapters beside the linear layers of `model` called `targets`, IN PLACE.

    Then only adapters and the parameters that `is_trained` names require gradients. The default
    names are those of Llama; GPT-NeoX has "query_key_value" and "dense". ValueError if no layer is
    called so.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if name in targets and isinstance(child, nn.Linear)
    ]
    if not found:
        raise ValueError(f"targets: got {targets}, expected names of linear layers of the model")
    for parent, name, child in found:
        setattr(parent, name, LoraLinear(child, r, alpha, dropout))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, trainable_params))
    return model


def merge(model: nn.Module) -> nn.Module:
    """Replaces every `LoraLinear` inside `model` by its merged layer, IN PLACE."""
    adapted = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, LoraLinear)
    ]
    for parent, name, child in adapted:
        setattr(parent, name, child.merged())
    return model
