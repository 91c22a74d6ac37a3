from difftuning_control.pipelines import DiffTuningIdeogram4Pipeline  # noqa: F401 for custom_pipeline=
