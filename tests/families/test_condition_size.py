"""Why a ControlNet of Stable Diffusion reads pictures: the stock pipeline takes a picture's size from its condition."""

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

from support.tiny_sd import tiny_pipeline


def test_no_stock_pipeline_draws_with_a_controlnet_that_reads_latents(tmp_path):
    """diffusers' class can be made to, and is loaded; docs/control.md gives this as the reason that ours do not."""
    base = tiny_pipeline()
    made = ControlNetModel.from_unet(base.unet, conditioning_channels=4, conditioning_embedding_out_channels=(16,))
    made.save_pretrained(tmp_path)
    controlnet = ControlNetModel.from_pretrained(tmp_path)
    pipe = StableDiffusionControlNetPipeline(**base.components, controlnet=controlnet, requires_safety_checker=False)
    call = {"prompt": "red", "image": torch.randn(1, 4, 8, 8), "num_inference_steps": 1, "output_type": "np"}
    with pytest.raises(RuntimeError, match=r"size of tensor a \(4\) must match the size of tensor b \(8\)"):
        pipe(**call, height=16, width=16)
