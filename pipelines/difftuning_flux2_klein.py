from difftuning_control.pipelines import DiffTuningFlux2KleinPipeline  # noqa: F401 for custom_pipeline=
