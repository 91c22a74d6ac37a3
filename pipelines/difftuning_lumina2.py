from difftuning_control.pipelines import DiffTuningLumina2Pipeline  # noqa: F401 for custom_pipeline=
