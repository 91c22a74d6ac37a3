from difftuning_control.pipelines import DiffTuningQwenImagePipeline  # noqa: F401 for custom_pipeline=
