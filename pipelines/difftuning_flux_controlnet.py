from difftuning_control.pipelines import DiffTuningFluxControlNetPipeline  # noqa: F401 for custom_pipeline=
