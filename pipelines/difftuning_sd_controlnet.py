from difftuning_control.pipelines import DiffTuningControlNetPipeline  # noqa: F401 for custom_pipeline=
