"""What trains: a LoRA adapter on the denoiser, all of its weights, or a ControlNet beside it, whole or by LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.fingerprint import sort_metadata

if TYPE_CHECKING:
    from difftuning_control.control import ControlSpec
    from difftuning_control.families.family import Family

LAYERS = (nn.Linear, nn.Conv2d)
ADAPTER = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"


def attach_lora(
    module: Any, rank: int, alpha: float | None, targets: str, dropout: float, seed: int, default: tuple[str, ...]
) -> None:
    """Freeze a diffusers model and inject W + (alpha / rank) · B A into its chosen modules; A is drawn from `seed`.

    Args:
        targets: names of modules separated by commas, or auto for `default`.

    Raises:
        UserError: unless every name is borne by linear or convolution modules only.
    """
    from peft import LoraConfig

    names = list(default) if targets == "auto" else [n.strip() for n in targets.split(",") if n.strip()]
    modules = dict(module.named_modules())
    named = {t: [m for n, m in modules.items() if n == t or n.endswith(f".{t}")] for t in names}
    unknown = [t for t, found in named.items() if not found or not all(isinstance(m, LAYERS) for m in found)]
    if unknown or not names:
        raise UserError(
            f"adapter.targets names {', '.join(unknown) or 'nothing'}, which are no linear or convolution modules of "
            f"what is tuned; expected names such as {', '.join(default)}, or auto."
        )
    module.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings: Any = {"r": rank, "lora_alpha": rank if alpha is None else alpha, "lora_dropout": dropout}
        module.add_adapter(LoraConfig(target_modules=names, init_lora_weights="gaussian", **settings))


class LoRATuning:
    """W + (alpha / rank) · B A on the chosen modules of the denoiser; only A and B train.

    References:
        LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), https://arxiv.org/abs/2106.09685
    """

    result = LORA_FILE

    def __init__(
        self,
        family: Family,
        rank: int,
        alpha: float | None = None,
        targets: str = "auto",
        dropout: float = 0.0,
        seed: int = 0,
    ):
        self.family = family
        attach_lora(family.denoiser, rank, alpha, targets, dropout, seed, family.lora_targets)
        for parameter in family.trained_whole():
            parameter.requires_grad_(True)
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

    result = "pipeline"

    def __init__(self, family: Family):
        self.family = family
        family.denoiser.float().requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.family.denoiser.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """Write a pipeline directory for `DiffusionPipeline.from_pretrained`."""
        self.family.save_pipeline(folder)


class ControlNetTuning:
    """The family's ControlNet, in float32, beside a frozen denoiser: all of its weights, or a LoRA.

    With a LoRA the condition embedding and the zero convolutions train whole, since a new condition must first be
    read and a new ControlNet's output is zero; what is saved is a ControlNet like any other, the update merged into it.

    Args:
        spec: how the conditions are made; saved beside the weights.
        adapter: rank, alpha, targets, dropout and seed of a LoRA; the whole ControlNet when None.

    References:
        Adding Conditional Control to Text-to-Image Diffusion Models (Zhang et al., 2023), https://arxiv.org/abs/2302.05543
        CtrLoRA: An Extensible and Efficient Framework for Controllable Image Generation (Xu et al., 2024),
        https://arxiv.org/abs/2410.09400
    """

    result = "controlnet"

    def __init__(
        self,
        family: Family,
        spec: ControlSpec,
        adapter: tuple[int, float | None, str, float, int] | None = None,
    ):
        self.family, self.spec = family, spec
        family.denoiser.requires_grad_(False)
        family.controlnet.float().requires_grad_(adapter is None)
        if adapter is not None:
            attach_lora(family.controlnet, *adapter, default=family.lora_targets)
            for name in family.controlnet_whole:
                getattr(family.controlnet, name).requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.family.controlnet.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """Write a directory for `ControlNetModel.from_pretrained`, with `control_spec.json` in it."""
        self.family.save_controlnet(folder, merged(self.family.controlnet))
        self.spec.save(folder)


def merged(module: Any) -> Any:
    """The model with its adapter's update added to the weights it belongs to; the model itself without an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuned = {n: m for n, m in module.named_modules() if isinstance(m, BaseTunerLayer)}
    if not tuned:
        return module
    state = {}
    for key, value in module.state_dict().items():
        if ".lora_" not in key:
            state[key.replace(".base_layer.", ".")] = value
    for name, layer in tuned.items():
        update: Any = layer
        state[f"{name}.weight"] = state[f"{name}.weight"] + update.get_delta_weight(ADAPTER).to(state[f"{name}.weight"])
    plain = type(module).from_config(module.config)
    plain.load_state_dict(state)
    return plain


RESULTS = {"lora": LoRATuning.result, "full": FullTuning.result, "controlnet": ControlNetTuning.result}
