from difftuning_control.pipelines import DiffTuningSD3ControlNetPipeline  # noqa: F401 for custom_pipeline=
