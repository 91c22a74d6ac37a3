"""The frozen linear layers of a transformer in 4 or 8 bits, by bitsandbytes.

    nf4     4 bits a weight, quantiles of a normal density in blocks of 64; a block's factor in 8 bits: 4.13 bits
    int8    8 bits a weight and a factor a row; inputs larger than 6 are multiplied in `dtype`

They are the layers that diffusers' own `BitsAndBytesConfig` makes, which loads on a GPU only. Rounding happens on the
CPU after loading, so that a base is the same one on every machine; and on a CPU the weights keep that layout. On a
processor with AVX512-BF16, bitsandbytes would pack the weights of nf4 anew at the first forward without gradients, in
blocks of 32 outputs: smaller layers break, and sampling would change how the weights are laid out. On one with AVX512
its version 0.50 reads a layer whose inputs are no multiple of 64 by a wrong block's factor: that one stays as it is.

References:
    QLoRA: Efficient Finetuning of Quantized LLMs (Dettmers et al., 2023), https://arxiv.org/abs/2305.14314
    LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale (Dettmers et al., 2022),
    https://arxiv.org/abs/2208.07339
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from difftuning_control.errors import UserError

OUTLIER = 6.0  # of int8, as in diffusers and the paper
BLOCK = 64  # weights of nf4 that share a factor
ROUNDING = 0.12  # of nf4, relative: 0.09 of normal and of uniform weights


def need_bitsandbytes(kind: str) -> None:
    """Refuse a machine without it.

    Raises:
        UserError: saying what to install.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization is {kind}, which needs bitsandbytes; run pip install 'difftuning-control[quantised]', "
            "or use float8, which needs nothing."
        )


def quantise_linears(denoiser: Any, kind: str, dtype: torch.dtype) -> None:
    """Put quantised layers in the place of all linear ones, in `denoiser` itself.

    Args:
        kind: nf4 or int8.
        dtype: of the computation.
    """
    for module in list(denoiser.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, _quantised(layer, kind, dtype))
    setattr(denoiser, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)  # which peft asks for


def _quantised(layer: nn.Linear, kind: str, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb  # an extra, which not everybody has

    sizes, weight = (layer.in_features, layer.out_features, layer.bias is not None), layer.weight.data
    packed: Any
    if kind == "nf4":
        packed = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", device="meta")
        packed.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        packed.support_avx512bf16_for_cpu = False  # one road on every processor
    else:
        packed = _linear8bit()(*sizes, has_fp16_weights=False, threshold=OUTLIER, device="meta")
        packed.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    packed.bias = layer.bias
    packed = packed.requires_grad_(False).to("cpu")
    if kind == "nf4" and layer.in_features % BLOCK:
        read = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state).float()
        if (read - weight).norm() > ROUNDING * weight.norm():
            return layer.requires_grad_(False)
    return packed


@cache
def _linear8bit() -> Any:
    """bitsandbytes' layer in 8 bits, which can be moved once it is quantised."""
    import bitsandbytes as bnb  # as above

    class Linear8bitLt(bnb.nn.Linear8bitLt):
        """Its weight in 8 bits and the factors of its rows go where the module around it goes: bitsandbytes moves them
        only where `to` of the layer itself is called, and else leaves those that it computes with on the CPU."""

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            weight: Any = self.weight
            holder = self.state if weight.CB is None else weight  # the state's from the first forward on
            factors = holder.SCB
            super()._apply(fn, recurse)
            weight = self.weight
            if factors is None:  # this is what quantises it
                return self
            holder = self.state if holder is self.state else weight
            weight.CB = weight.SCB = None  # an older one has rounded again what was rounded, with other factors
            holder.CB, holder.SCB = weight.data, factors.to(weight.device)
            return self

    return Linear8bitLt


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights by name, those of quantised layers as numbers again."""
    state = module.state_dict()
    for name, layer in module.named_modules():
        kind = type(getattr(layer, "weight", None)).__name__
        if kind in ("Params4bit", "Int8Params"):
            from peft.utils.integrations import dequantize_bnb_weight  # asks for bitsandbytes, an extra

            own: Any = layer
            key = f"{name}.weight" if name else "weight"
            state[key] = dequantize_bnb_weight(own.weight, getattr(own, "state", None))
    return state
