"""The header of a LoRA file for other tools: which model they take it for, and what it keeps to itself."""

from __future__ import annotations

import json

import pytest
import torch

from difftuning_control.families.loading import family_of
from difftuning_control.recipe.inputs import DataConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import TrainingConfig
from difftuning_control.runs.record import RunRecord
from difftuning_control.runs.record_sections import DataRecord
from difftuning_control.verbs.export.tool_metadata import published_as, tool_metadata
from support.flow_families import need
from support.tiny_flow import tiny_chroma, tiny_z_image
from support.tiny_models import tiny_flux, tiny_lumina2, tiny_sd3, tiny_sdxl
from support.tiny_sd import tiny_pipeline

LAYERS = {"a": (4, 8.0), "b": (4, 8.0)}


def tensors(layers: dict[str, tuple[int, float]] = LAYERS) -> dict[str, torch.Tensor]:
    down = {f"lora_unet_{n}.lora_down.weight": torch.zeros(rank, 6) for n, (rank, _) in layers.items()}
    up = {f"lora_unet_{n}.lora_up.weight": torch.zeros(6, rank) for n, (rank, _) in layers.items()}
    return down | up | {f"lora_unet_{n}.alpha": torch.tensor(alpha) for n, (_, alpha) in layers.items()}


def record(trigger: str | None = None) -> RunRecord:
    recipe = Recipe(
        data=DataConfig("/home/someone/secret", trigger=trigger), training=TrainingConfig(learning_rate=2e-4, seed=3)
    )
    return RunRecord(
        status="complete",
        recipe_values=recipe.to_dict(),
        data=DataRecord(pictures=8, resolution=512),
        prompts=["a caption of someone"],
        steps=120,
        seed=3,
    )


def web_ui_takes_it_for(metadata: dict[str, str]) -> str:
    """The rule of AUTOMATIC1111's web UI (extensions-builtin/Lora/network.py), in words of our own."""
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    return "SD2" if metadata.get("ss_v2") == "True" else "SD1" if metadata else "unknown"


@pytest.mark.parametrize(
    ("make", "version", "architecture"),
    [
        (tiny_pipeline, "sd_v1", "stable-diffusion-v1"),
        (tiny_sdxl, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
        (tiny_sd3, "sd3-medium", "stable-diffusion-3-medium"),
        (tiny_flux, "flux1", "flux-1-dev"),
        (lambda: tiny_flux(dev=False), "flux1", "flux-1-schnell"),
        (tiny_lumina2, "lumina2", "lumina-2"),
    ],
)
def test_tools_are_told_the_model(make, version, architecture):
    family = family_of(make())
    found = tool_metadata(family, record(), tensors(), "mine")
    assert (found["ss_base_model_version"], found["modelspec.architecture"]) == (version, f"{architecture}/lora")
    assert found["modelspec.title"] == found["ss_output_name"] == "mine"
    assert (web_ui_takes_it_for(found) == "SDXL") is (family.name == "sdxl")
    assert ("modelspec.prediction_type" in found) is (family.name in ("sd", "sdxl"))


def test_chroma_is_none_of_flux():
    need("chroma")
    published = published_as(family_of(tiny_chroma()))
    assert (published.version, published.architecture) == ("chroma", "chroma")


def test_the_second_version_of_stable_diffusion_is_told_by_its_width_and_its_prediction():
    family = family_of(tiny_pipeline(prediction_type="v_prediction"))
    found = tool_metadata(family, record(), tensors(), "mine")
    assert (found["ss_base_model_version"], found["modelspec.prediction_type"]) == ("sd_v1_v", "v")
    family.denoiser.register_to_config(cross_attention_dim=1024)
    found = tool_metadata(family, record(), tensors(), "mine")
    assert (found["ss_base_model_version"], found["modelspec.architecture"]) == (
        "sd_v2_v",
        "stable-diffusion-v2-768-v/lora",
    )
    assert web_ui_takes_it_for(found) == "SD2"


def test_a_model_that_they_do_not_know_has_no_name():
    need("z_image")
    found = tool_metadata(family_of(tiny_z_image()), record(), tensors(), "mine")
    assert not {"ss_base_model_version", "modelspec.architecture"} & set(found)
    assert found["ss_network_dim"] == "4"


def test_ranks_and_training_are_told_and_neither_places_nor_captions():
    family = family_of(tiny_pipeline())
    found = tool_metadata(family, record(), tensors(), "mine")
    expected = {
        "format": "pt",
        "ss_network_dim": "4",
        "ss_network_alpha": "8",
        "ss_num_train_images": "8",
        "ss_resolution": "(512, 512)",
        "ss_learning_rate": "0.0002",
        "ss_steps": "120",
        "ss_seed": "3",
        "ss_network_module": "networks.lora",
        "ss_v2": "False",
        "modelspec.resolution": "512x512",
    }
    assert {k: v for k, v in found.items() if k in expected} == expected
    assert not any(word in json.dumps(found) for word in ("secret", "someone", "caption"))
    mixed = tool_metadata(family, record(), tensors({"a": (4, 8.0), "b": (12, 24.0)}), "mine")
    assert (mixed["ss_network_dim"], mixed["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def test_the_trigger_is_told_where_tools_look_for_it():
    family = family_of(tiny_pipeline())
    found = tool_metadata(family, record("zbx dog"), tensors(), "mine")
    assert found["modelspec.trigger_phrase"] == "zbx dog"
    assert json.loads(found["ss_tag_frequency"]) == {"mine": {"zbx dog": 8}}
    assert not {"modelspec.trigger_phrase", "ss_tag_frequency"} & set(tool_metadata(family, record(), tensors(), "a"))
