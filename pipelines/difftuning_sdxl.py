from difftuning_control.pipelines import DiffTuningXLPipeline  # noqa: F401 for custom_pipeline=
