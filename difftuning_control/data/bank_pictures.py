"""Real pictures that a knowledge bank is made of, in place of samples of the pretrained model."""

from __future__ import annotations

from pathlib import Path

from difftuning_control.data.datasets import Choice, is_dataset, local_dataset
from difftuning_control.data.examples import ImageData
from difftuning_control.data.sources import load_images, place_of_data
from difftuning_control.data.splits import is_hidden
from difftuning_control.recipe.inputs import DataConfig


def pictures_of_bank(path: str | Path, data: DataConfig, has_classes: bool) -> ImageData:
    """The pictures of a bank's folder; those without captions stand for the empty prompt.

    Args:
        data: whose column of pictures is meant where the bank is a data set that has it; else it is `image`.
        has_classes: of a model that is told classes, pictures in sub-folders stand for the class that a sub-folder is
            named after.
    """
    folder, choice = place_of_data(str(path)), Choice(option="another folder")
    beside = [p for p in folder.iterdir() if not is_hidden(p, folder)] if folder.is_dir() else []
    folders = any(p.is_dir() for p in beside) and not any(p.stem == "metadata" for p in beside)
    image_column = data.image_column
    if beside and is_dataset(folder) and image_column not in local_dataset(folder, choice)[0].column_names:
        image_column = DataConfig.image_column
    return load_images(
        str(path),
        caption_column=data.caption_column,
        image_column=image_column,
        skip_bad=data.skip_bad,
        need_captions=False,
        classes="folders" if has_classes and folders else None,
        max_pixels=data.max_pixels,
        choice=choice,
    )
