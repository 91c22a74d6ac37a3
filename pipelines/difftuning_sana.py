from difftuning_control.pipelines import DiffTuningSanaPipeline  # noqa: F401 for custom_pipeline=
