"""The metadata of a LoRA file, by which other tools tell the model that it is for, its ranks and how it was trained.

Web UIs hide a LoRA that they take for another model's, and take one for Stable Diffusion 1's where it has any metadata
but not these. Nothing here says where something lay, or what a caption said beside the trigger.

References:
    https://github.com/kohya-ss/sd-scripts (train_network.py, library/sai_model_spec.py),
    https://github.com/Stability-AI/ModelSpec, version 1.0.1
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.runs.record import RunRecord

DIFFUSERS = "diffusers"
GENERATIVE_MODELS = "https://github.com/Stability-AI/generative-models"
FLUX = "https://github.com/black-forest-labs/flux"
CHROMA = "https://huggingface.co/lodestones/Chroma"
LUMINA = "https://github.com/Alpha-VLLM/Lumina-Image-2.0"


@dataclass(frozen=True)
class Published:
    """How tools name a model.

    Args:
        version: sd-scripts' `ss_base_model_version`, which of Stable Diffusion 3 is here more than the size alone.
        architecture: ModelSpec's.
        implementation: whose code the names of the layers are of.
        network: the module of sd-scripts that trains such a LoRA.
    """

    version: str
    architecture: str
    implementation: str
    network: str


def predicts_v(family: Family) -> bool:
    return bool(family.pipe.scheduler.config.get("prediction_type") == "v_prediction")


def published_as(family: Family) -> Published | None:
    """How tools name a model; None of those that sd-scripts and ModelSpec do not know."""
    config: Any = family.denoiser.config
    if family.name == "sd":
        is_v = predicts_v(family)
        if config.cross_attention_dim != 1024:  # OpenCLIP's width, which came with version 2
            return Published("sd_v1" + "_v" * is_v, "stable-diffusion-v1", DIFFUSERS, "networks.lora")
        architecture = "stable-diffusion-v2-" + ("768-v" if is_v else "512")
        return Published("sd_v2" + "_v" * is_v, architecture, DIFFUSERS, "networks.lora")
    if family.name == "sdxl":
        return Published("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", GENERATIVE_MODELS, "networks.lora")
    if family.name == "sd3":
        size = "5-large" if config.num_layers == 38 else "5-medium" if config.dual_attention_layers else "medium"
        return Published(f"sd3-{size}", f"stable-diffusion-3-{size}", DIFFUSERS, "networks.lora_sd3")
    if family.name == "flux":
        kind = "dev" if config.guidance_embeds else "schnell"
        return Published("flux1", f"flux-1-{kind}", FLUX, "networks.lora_flux")
    if family.name == "chroma":
        return Published("chroma", "chroma", CHROMA, "networks.lora_flux")
    if family.name == "lumina2":
        return Published("lumina2", "lumina-2", LUMINA, "networks.lora_lumina")
    return None


def tool_metadata(family: Family, record: RunRecord, tensors: Mapping[str, Tensor], title: str) -> dict[str, str]:
    """The header of a LoRA file whose tensors have the names of kohya or ComfyUI.

    Args:
        family: the base.
        title: the name of the file.
    """
    recipe, published = record.recipe, published_as(family)
    ranks = (str(len(v)) for k, v in tensors.items() if k.endswith("lora_down.weight"))
    alphas = (f"{float(v):g}" for k, v in tensors.items() if k.endswith(".alpha"))
    found = {
        "format": "pt",
        "ss_output_name": title,
        "ss_network_dim": _one(ranks),
        "ss_network_alpha": _one(alphas),
        "ss_num_train_images": str(record.data.pictures),
        "ss_resolution": f"({record.data.resolution}, {record.data.resolution})",
        "ss_learning_rate": f"{recipe.training.learning_rate:g}",
        "ss_steps": str(record.steps),
        "ss_seed": str(record.seed),
    }
    if (trigger := recipe.data.trigger) is not None:  # which web UIs offer for the prompt
        found["ss_tag_frequency"] = json.dumps({title: {trigger: record.data.pictures}}, ensure_ascii=False)
    if published is None:
        return found
    predicted = {"modelspec.prediction_type": "v" if predicts_v(family) else "epsilon"}
    return (
        found
        | {
            "ss_base_model_version": published.version,
            "ss_network_module": published.network,
            "ss_v2": str(published.version.startswith("sd_v2")),
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{published.architecture}/lora",
            "modelspec.implementation": published.implementation,
            "modelspec.title": title,
            "modelspec.resolution": f"{record.data.resolution}x{record.data.resolution}",
        }
        | ({"modelspec.trigger_phrase": trigger} if trigger is not None else {})
        | (predicted if family.name in ("sd", "sdxl") else {})
    )


def _one(values: Iterable[str]) -> str:
    """The value that all have; as sd-scripts says it, "Dynamic" where they differ."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else "Dynamic"
