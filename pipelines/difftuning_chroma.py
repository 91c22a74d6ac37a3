from difftuning_control.pipelines import DiffTuningChromaPipeline  # noqa: F401 for custom_pipeline=
