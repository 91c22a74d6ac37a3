from difftuning_control.pipelines import DiffTuningXLControlNetPipeline  # noqa: F401 for custom_pipeline=
