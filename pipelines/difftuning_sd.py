from difftuning_control.pipelines import DiffTuningPipeline  # noqa: F401 for custom_pipeline=
