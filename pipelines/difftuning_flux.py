from difftuning_control.pipelines import DiffTuningFluxPipeline  # noqa: F401 for custom_pipeline=
