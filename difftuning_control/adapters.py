"""What trains: a LoRA adapter on the denoiser, or all of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.fingerprint import sort_metadata

if TYPE_CHECKING:
    from difftuning_control.families.sd import StableDiffusion

LAYERS = (nn.Linear, nn.Conv2d)
ADAPTER = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"


class LoRATuning:
    """W + (alpha / rank) · B A on the chosen linear and convolution modules; only A and B train.

    Raises:
        UserError: unless every name is borne by linear or convolution modules of the denoiser only.

    References:
        LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), https://arxiv.org/abs/2106.09685
    """

    def __init__(
        self,
        family: StableDiffusion,
        rank: int,
        alpha: float | None = None,
        targets: str = "auto",
        dropout: float = 0.0,
        seed: int = 0,
    ):
        from peft import LoraConfig

        self.family = family
        names = list(family.lora_targets) if targets == "auto" else [n.strip() for n in targets.split(",") if n.strip()]
        modules = dict(family.denoiser.named_modules())
        named = {t: [m for n, m in modules.items() if n == t or n.endswith(f".{t}")] for t in names}
        unknown = [t for t, found in named.items() if not found or not all(isinstance(m, LAYERS) for m in found)]
        if unknown or not names:
            raise UserError(
                f"adapter.targets names {', '.join(unknown) or 'nothing'}, which are no linear or convolution "
                "modules of the denoiser; "
                f"expected names such as {', '.join(family.lora_targets)}, or auto."
            )
        family.denoiser.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            settings: Any = {"r": rank, "lora_alpha": rank if alpha is None else alpha, "lora_dropout": dropout}
            family.denoiser.add_adapter(LoraConfig(target_modules=names, init_lora_weights="gaussian", **settings))
        for parameter in self.parameters().values():
            parameter.data = parameter.data.float()

    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.family.denoiser.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors` for `load_lora_weights`."""
        from peft import get_peft_model_state_dict

        layers: dict[str, Tensor] = get_peft_model_state_dict(self.family.denoiser, adapter_name=ADAPTER)
        config = self.family.denoiser.peft_config[ADAPTER].to_dict()
        config["target_modules"] = sorted(config["target_modules"])  # a set, whose order changes from run to run
        self.family.save_lora(folder, {k: v.float() for k, v in layers.items()}, config)
        sort_metadata(folder / LORA_FILE)


class FullTuning:
    """All weights of the denoiser, in float32."""

    def __init__(self, family: StableDiffusion):
        self.family = family
        family.denoiser.float().requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.family.denoiser.named_parameters())

    def save(self, folder: Path) -> None:
        """Write a pipeline directory for `DiffusionPipeline.from_pretrained`."""
        self.family.save_pipeline(folder)
