from difftuning_control.pipelines import DiffTuningKrea2Pipeline  # noqa: F401 for custom_pipeline=
