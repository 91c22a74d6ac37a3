from difftuning_control.pipelines import DiffTuningSD3Pipeline  # noqa: F401 for custom_pipeline=
