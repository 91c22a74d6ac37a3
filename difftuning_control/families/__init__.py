"""The families of models, a file each; trainer, bank and analysis see only what `Family` in `family.py` shows."""

from difftuning_control.families.hub import best_device, quiet_loading, why_not
from difftuning_control.families.loading import (
    FAMILIES,
    embedded_model,
    family_of,
    load_controlnet,
    load_controlnet_model,
    load_family,
)

__all__ = [
    "FAMILIES",
    "best_device",
    "embedded_model",
    "family_of",
    "load_controlnet",
    "load_controlnet_model",
    "load_family",
    "quiet_loading",
    "why_not",
]
