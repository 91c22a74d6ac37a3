from difftuning_control.pipelines import DiffTuningZImagePipeline  # noqa: F401 for custom_pipeline=
