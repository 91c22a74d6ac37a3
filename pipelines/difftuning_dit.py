from difftuning_control.pipelines import DiffTuningDiTPipeline  # noqa: F401 for custom_pipeline=
