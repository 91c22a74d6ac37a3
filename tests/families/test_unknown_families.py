"""Models that no family is for are refused by name, with those that are known."""

import json

import pytest

from difftuning_control.errors import UserError
from difftuning_control.families.loading import load_family


@pytest.mark.parametrize(
    ("file", "index", "said"),
    [
        (
            "model_index.json",
            {"_class_name": "HunyuanImagePipeline"},
            "is a HunyuanImagePipeline, which cannot be tuned",
        ),
        ("model_index.json", {"_class_name": "QwenImageEditPipeline"}, "is a QwenImageEditPipeline, which cannot"),
        ("modular_model_index.json", {"_class_name": "AnimaModularPipeline"}, "is a modular pipeline, which cannot be"),
    ],
)
def test_a_model_without_a_family_is_refused_with_those_that_are_known(file, index, said, tmp_path):
    (tmp_path / file).write_text(json.dumps({**index, "_diffusers_version": "0.42.1"}), encoding="utf-8")
    with pytest.raises(UserError, match=said) as refused:
        load_family(str(tmp_path))
    assert str(refused.value).endswith("Ideogram4Pipeline.")
    assert "StableDiffusionPipeline" in str(refused.value)
