"""The paper's method: noise processes, schedules, the objective and its budget; it imports nothing else of ours."""

from difftuning_control.objective.difftuning import (
    PRESETS,
    DiffTuningObjective,
    NoisedBatch,
    per_sample_loss,
)
from difftuning_control.objective.masking import mask_weights
from difftuning_control.objective.rows import Bank, extend_rows

__all__ = ["PRESETS", "Bank", "DiffTuningObjective", "NoisedBatch", "extend_rows", "mask_weights", "per_sample_loss"]
