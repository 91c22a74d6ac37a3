"""The paper's method: noise processes, schedules, the objective and its budget; it imports nothing else of ours."""

from difftuning_control.objective.difftuning import (
    PRESETS,
    DiffTuningObjective,
    DrawsLatents,
    NoisedBatch,
    per_sample_loss,
)

__all__ = ["PRESETS", "DiffTuningObjective", "DrawsLatents", "NoisedBatch", "per_sample_loss"]
