"""The parts of a model that train: an adapter, all weights, or a ControlNet beside it, whole or by LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from difftuning_control.adapters.difffit import DiffFit, TrainedWhole, branch_ends
from difftuning_control.adapters.files import DIFFFIT_FILE, LORA_FILE, PEFT_FOLDER, save_difffit, save_lora, save_peft
from difftuning_control.adapters.kinds import ADAPTER, BESIDE, attach, keep_part, target_layers
from difftuning_control.adapters.lora_start import FACTOR, Down, Up, factors
from difftuning_control.errors import UserError
from difftuning_control.recipe.adapter_kinds import LORA_KINDS

if TYPE_CHECKING:
    from difftuning_control.data.control_spec import ControlSpec
    from difftuning_control.families.family import Family
    from difftuning_control.recipe.adapter import AdapterConfig
    from difftuning_control.recipe.recipe import Recipe
    from difftuning_control.recipe.training import TrainingConfig

UNDECAYED = (
    "ia3_",
    "boft_s",
    "lora_magnitude_vector",
    "embedding_table",
    f".{FACTOR}",
)  # factors: zero is not where they start


def check_adapter(family: Family, config: AdapterConfig) -> None:
    """Refuse what does not fit the model, before anything is encoded or drawn for it.

    Raises:
        UserError: saying what.
    """
    if config.text_encoder and not family.text_lora_targets:
        raise UserError(f"adapter.text_encoder is true, which the family {family.name} does not train yet.")
    module = family.controlnet if config.on == "controlnet" else family.denoiser
    if config.kind == "difffit":
        branch_ends(module)  # refuses what it does not know
    else:
        target_layers(module, config, family.lora_targets)


class AdapterTuning:
    """An adapter on the denoiser, and perhaps a LoRA on its text encoder, in float32; everything else stays.

    References:
        LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685; rsLoRA: Kalajdzievski, 2023,
        https://arxiv.org/abs/2312.03732; PiSSA: Meng et al., 2024, https://arxiv.org/abs/2404.02948
        DoRA: Liu et al., 2024, https://arxiv.org/abs/2402.09353
        LoHa, LoKr: Yeh et al., 2023, https://arxiv.org/abs/2309.14859
        OFT: Qiu et al., 2023, https://arxiv.org/abs/2306.07280; BOFT: Liu et al., 2023, https://arxiv.org/abs/2311.06243
        IA3: Liu et al., 2022, https://arxiv.org/abs/2205.05638
        T-LoRA and DiffFit: see `tlora` and `difffit`.

    Raises:
        UserError: if the adapter does not fit the model.
    """

    def __init__(self, family: Family, config: AdapterConfig, seed: int = 0):
        self.family, self.config, self.result = family, config, adapter_result(config)
        check_adapter(family, config)
        if config.kind == "difffit":
            family.denoiser.requires_grad_(False)
            own = DiffFit(family.denoiser, ADAPTER)
            for parameter in own.parameters.values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
            keep_part(family.denoiser, ADAPTER, own)
        else:
            attach(family.denoiser, config, seed, family.lora_targets, family.process)
        if whole := family.trained_whole():
            beside = TrainedWhole(whole, ADAPTER)
            for parameter in whole.values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
            keep_part(family.denoiser, BESIDE.format(ADAPTER), beside)
        if config.text_encoder:
            attach(family.pipe.text_encoder, replace(config, targets="auto"), seed, family.text_lora_targets)

    def parameters(self) -> dict[str, nn.Parameter]:
        parameters = trainable(self.family.denoiser)
        if self.config.text_encoder:
            parameters |= {f"text_encoder.{n}": p for n, p in trainable(self.family.pipe.text_encoder).items()}
        return parameters

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: what trains, and what it started from where that is taken away again."""
        tensors = dict(self.parameters()) | starts(self.family.denoiser)
        if self.config.text_encoder:
            tensors |= {f"text_encoder.{n}": t for n, t in starts(self.family.pipe.text_encoder).items()}
        return tensors

    def groups(self, training: TrainingConfig) -> list[dict[str, Any]]:
        """The optimizer's groups: the text encoder has its own learning rate, and factors do not decay to zero."""
        rate = self.config.text_encoder_learning_rate or training.learning_rate
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.parameters().items():
            kept = self.config.kind == "difffit" or any(part in name for part in UNDECAYED)
            groups.setdefault((name.startswith("text_encoder."), kept), []).append(parameter)
        return [
            {
                "params": members,
                "lr": rate if text else training.learning_rate,
                "weight_decay": 0.0 if kept else training.weight_decay,
            }
            for (text, kept), members in groups.items()
        ]

    def save(self, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors` for `load_lora_weights`, or what `load_adapter` takes."""
        if self.config.kind in LORA_KINDS:
            text_encoder = self.family.pipe.text_encoder if self.config.text_encoder else None
            save_lora(self.family.denoiser, text_encoder, self.family.save_lora, folder)
        elif self.config.kind == "difffit":
            save_difffit(self.family.denoiser, folder)
        else:
            save_peft(self.family.denoiser, folder)
        if self.family.trained_whole():
            self.family.save_trained_whole(folder)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def starts(module: nn.Module) -> dict[str, Tensor]:
    """What the LoRA factors of a model started from, by name, where it is taken away again."""
    return {f"{n}.start": m.start for n, m in module.named_modules() if isinstance(m, (Down, Up))}


def adapter_result(config: AdapterConfig) -> str:
    """What a run with this adapter leaves in its output."""
    if config.kind in LORA_KINDS:
        return LORA_FILE
    return DIFFFIT_FILE if config.kind == "difffit" else PEFT_FOLDER


class FullTuning:
    """All weights of the denoiser, in float32."""

    result = "pipeline"

    def __init__(self, family: Family):
        self.family = family
        family.denoiser.float().requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.family.denoiser.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        return dict(self.parameters())

    def groups(self, training: TrainingConfig) -> list[dict[str, Any]]:
        return one_group(self.parameters(), training)

    def save(self, folder: Path) -> None:
        """Write a pipeline directory for `DiffusionPipeline.from_pretrained`."""
        self.family.save_pipeline(folder)


class ControlNetTuning:
    """The family's ControlNet, in float32, beside a frozen denoiser: all of its weights, or a LoRA.

    With a LoRA the condition embedding and the zero convolutions train whole, since a new condition must first be
    read and a new ControlNet's output is zero; what is saved is a ControlNet like any other, the update merged into it.

    Args:
        spec: how the conditions are made; saved beside the weights.
        adapter: of kind lora; the whole ControlNet when None.
        seed: of the adapter.

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
        adapter: AdapterConfig | None = None,
        seed: int = 0,
    ):
        self.family, self.spec = family, spec
        family.denoiser.requires_grad_(False)
        family.controlnet.float().requires_grad_(adapter is None)
        if adapter is not None:
            attach(family.controlnet, adapter, seed, family.lora_targets)
            for name, parameter in family.controlnet.named_parameters():
                if not set(family.controlnet_whole).isdisjoint(name.split(".")):
                    parameter.requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        return trainable(self.family.controlnet)

    def state(self) -> dict[str, Tensor]:
        return dict(self.parameters()) | starts(self.family.controlnet)

    def groups(self, training: TrainingConfig) -> list[dict[str, Any]]:
        return one_group(self.parameters(), training)

    def save(self, folder: Path) -> None:
        """Write a directory for `ControlNetModel.from_pretrained`, with `control_spec.json` in it."""
        self.family.save_controlnet(folder, merged(self.family.controlnet))
        self.spec.save(folder)


def one_group(parameters: dict[str, nn.Parameter], training: TrainingConfig) -> list[dict[str, Any]]:
    """An optimizer's group of all parameters."""
    values = list(parameters.values())
    return [{"params": values, "lr": training.learning_rate, "weight_decay": training.weight_decay}]


def merged(module: Any) -> Any:
    """The model with its adapter's update added to the weights it belongs to; the model itself without an adapter."""
    tuned = {n: m for n, m in module.named_modules() if isinstance(m, BaseTunerLayer)}
    if not tuned:
        return module
    state = {}
    for key, value in module.state_dict().items():
        if ".lora_" not in key:
            state[key.replace(".base_layer.", ".")] = value
    for name, layer in tuned.items():
        update: Any = layer
        if isinstance(update.lora_A[ADAPTER], Down):
            a, b = factors(update, ADAPTER)
            delta = update.scaling[ADAPTER] * (b @ a)
        else:
            delta = update.get_delta_weight(ADAPTER)
        state[f"{name}.weight"] = state[f"{name}.weight"] + delta.to(state[f"{name}.weight"])
    plain = type(module).from_config(module.config)
    plain.load_state_dict(state)
    return plain


def result_of(recipe: Recipe) -> str:
    """What a run of this recipe leaves in its output, by name."""
    if recipe.method == "lora":
        return adapter_result(recipe.adapter)
    return FullTuning.result if recipe.method == "full" else ControlNetTuning.result
