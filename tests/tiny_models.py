"""A tiny real pipeline of every family beside conftest's, made from seeds: 16×16 pictures, 8×8 latents."""

from __future__ import annotations

import torch
from conftest import tiny_tokenizer, tiny_xl_pipeline

T5_WORDS = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789"]


def tiny_vae(shift_factor: float, sharp: bool = False):
    """An autoencoder that halves pictures; `sharp` has no spread around the mean."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=16, mid_block_add_attention=False, scaling_factor=0.7, shift_factor=shift_factor,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    if sharp:
        sharpen(vae)
    return vae


def sharpen(vae) -> None:
    """Take the spread around the mean of its posteriors from an autoencoder."""
    rows = slice(4, None)
    if vae.quant_conv is not None:
        torch.nn.init.dirac_(vae.quant_conv.weight)
        torch.nn.init.zeros_(vae.quant_conv.bias)
    vae.encoder.conv_out.weight.data[rows] = 0
    vae.encoder.conv_out.bias.data[rows] = -30


def tiny_clip(pooled: bool = False):
    """A CLIP text encoder and its tokenizer; `pooled` with a projection, as SDXL's second and SD3's two."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, projection_dim=16,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if pooled else CLIPTextModel)(config), tokenizer


def tiny_t5(width: int = 32):
    """A T5 encoder and its tokenizer of single letters."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocabulary = [(w, float(-i)) for i, w in enumerate(T5_WORDS)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0,
        eos_token_id=1, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config), tokenizer


def tiny_sdxl(seed: int = 0, prediction_type: str = "epsilon", sharp: bool = False):
    """conftest's, and perhaps with an autoencoder that has no spread."""
    pipe = tiny_xl_pipeline(seed, prediction_type)
    if sharp:
        sharpen(pipe.vae)
    return pipe


def tiny_sd3(seed: int = 0, t5: bool = True, sharp: bool = False):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    (one, first), (two, second), (three, third) = tiny_clip(True), tiny_clip(True), tiny_t5()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=tiny_vae(0.06, sharp),
        text_encoder=one, tokenizer=first, text_encoder_2=two, tokenizer_2=second,
        text_encoder_3=three if t5 else None, tokenizer_3=third if t5 else None,
    )  # fmt: skip


def tiny_flux(seed: int = 0, dev: bool = True, sharp: bool = False):
    """`dev` is told a guidance scale and shifts its timesteps by resolution; schnell does neither."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    (one, first), (two, second) = tiny_clip(), tiny_t5()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=dev, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    shifting = {"use_dynamic_shifting": True, "shift": 3.0} if dev else {"shift": 1.0}
    return FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(**shifting), vae=tiny_vae(0.06, sharp),
        text_encoder=one, tokenizer=first, text_encoder_2=two, tokenizer_2=second,
    )  # fmt: skip
