from difftuning_control.pipelines import DiffTuningQwenImage21Pipeline  # noqa: F401 for custom_pipeline=
