from difftuning_control.pipelines import DiffTuningFlux2Pipeline  # noqa: F401 for custom_pipeline=
