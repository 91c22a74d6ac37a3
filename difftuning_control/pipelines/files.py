"""Where the one-line file of a drop-in pipeline lies, for diffusers' `custom_pipeline=`."""

from __future__ import annotations

from difftuning_control.errors import UserError
from difftuning_control.pipelines.registry import BY_NAME, DROP_INS
from difftuning_control.system.shipped import near, shipped


def pipeline_path(name: str) -> str:
    """The path of a one-line pipeline file, as text, since diffusers takes no other.

    Args:
        name: of the file (`difftuning_sd`), or of the class in it (`DiffTuningPipeline`).

    Raises:
        UserError: with near names, if there is none.
    """
    file = BY_NAME[name].file if name in BY_NAME else name.removesuffix(".py")
    files = [drop_in.file for drop_in in DROP_INS]
    if file not in files:
        raise UserError(f"there is no pipeline {name!r}; {near(name, [*files, *BY_NAME])}.")
    return str(shipped("pipelines") / f"{file}.py")
