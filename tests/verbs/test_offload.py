"""Text encoders under `model.offload` run only while they have the device's memory: inside `family.encoding()`."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from difftuning_control import cli
from difftuning_control.families.family import Family
from support.tiny_models import tiny_flux, tiny_sd3

MODELS = {"sd3": tiny_sd3, "flux": tiny_flux}


@pytest.mark.parametrize("name", MODELS)
def test_fault_15_17_sampling_encodes_inside_only(name, tmp_path, monkeypatch):
    MODELS[name]().save_pretrained(tmp_path / "model")
    opened, calls = [0], []
    encoding = Family.encoding

    @contextmanager
    def watched(self):
        with encoding(self):
            opened[0] += 1
            yield
            opened[0] -= 1

    monkeypatch.setattr(Family, "encoding", watched)
    for kind in (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel):

        def forward(self, *args, original=kind.forward, **kwargs):
            calls.append(opened[0])
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)
    words = ["--model.id", str(tmp_path / "model"), "--model.offload", "true", "--steps", "1", "--resolution", "16"]
    cli.main(["sample", *words, "--prompts", '["a red one"]', "--output", str(tmp_path / "drawn")])
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 1
    assert calls
    assert set(calls) == {1}
