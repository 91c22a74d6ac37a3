"""A tiny real pipeline of each family of 2025 and 2026, made from seeds: pictures of 16×16, latents of 8×8 or fewer."""

from __future__ import annotations

import torch

from support.tiny_language import tiny_mistral, tiny_qwen3, tiny_qwen3_vl, tiny_qwen3_vl_processor, tiny_qwen_vl
from support.tiny_models import tiny_t5, tiny_vae
from support.tiny_sd import TINY_VAE


def tiny_z_image(seed: int = 0, dynamic: bool = False, layers: int = 3):
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(seed)
    encoder, tokenizer = tiny_qwen3()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[600, 32, 32],
    )
    spread(transformer)
    shifting = {"use_dynamic_shifting": True} if dynamic else {"shift": 3.0}
    scheduler = FlowMatchEulerDiscreteScheduler(**shifting)
    return ZImagePipeline(scheduler, tiny_vae(0.06), encoder, tokenizer, transformer)


BY_CHANNEL = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 0.8, 1.2, 1.0]}  # of latents


def tiny_qwen_vae():
    """An autoencoder for video that halves pictures, with numbers by channel for its latents."""
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        **BY_CHANNEL,
    )
    vae.decoder.conv_out.weight.data *= 4  # whose pictures would be nearly grey
    return vae


def qwen_scheduler():
    """Qwen-Image's, whose shift is by resolution."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )


def tiny_qwen_image(seed: int = 0, layers: int = 2):
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(seed)
    encoder, tokenizer = tiny_qwen_vl()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    return QwenImagePipeline(qwen_scheduler(), tiny_qwen_vae(), encoder, tokenizer, transformer)


def tiny_qwen_image21(seed: int = 0, sigmas: list[float] | None = None):
    """With `sigmas` one of as many steps."""
    from diffusers import (
        AutoencoderKLQwenImage21,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )

    torch.manual_seed(seed)
    encoder, processor = tiny_qwen3_vl_processor()
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    spread(transformer)
    vae = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        **BY_CHANNEL,
    )
    vae.decoder.conv_out.weight.data *= 4  # whose pictures would be nearly grey
    vae.quant_conv.bias.data[4:] -= 6  # whose posterior would be wider than what it tells pictures apart by
    return QwenImage21Pipeline(qwen_scheduler(), vae, encoder, processor, transformer, sample_sigmas=sigmas)


def tiny_flux2_vae():
    """An autoencoder that halves pictures, with statistics for each place and channel of a square of four."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        **TINY_VAE,
    )
    vae.bn.running_mean.data = torch.randn(16) * 0.2
    vae.bn.running_var.data = torch.rand(16) + 0.5
    return vae


def tiny_flux2_parts(seed: int, dev: bool) -> dict:
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    torch.manual_seed(seed)
    encoder, tokenizer = tiny_mistral() if dev else tiny_qwen3(layers=27, causal=True)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=dev,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return {
        "scheduler": scheduler,
        "vae": tiny_flux2_vae(),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "transformer": transformer,
    }


def tiny_flux2_klein(seed: int = 0, distilled: bool = False):
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline(**tiny_flux2_parts(seed, dev=False), is_distilled=distilled)


def tiny_flux2(seed: int = 0):
    """dev, which is told a guidance scale."""
    from diffusers import Flux2Pipeline

    return Flux2Pipeline(**tiny_flux2_parts(seed, dev=True))


def tiny_krea2(seed: int = 0, distilled: bool = False):
    from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel

    torch.manual_seed(seed)
    encoder, tokenizer = tiny_qwen3_vl()
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    spread(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400)
    layers = {"text_encoder_select_layers": (1, 2, 3), "is_distilled": distilled}
    return Krea2Pipeline(scheduler, tiny_qwen_vae(), encoder, tokenizer, transformer, **layers)


def tiny_chroma(seed: int = 0):
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(seed)
    encoder, tokenizer = tiny_t5()
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return ChromaPipeline(scheduler, tiny_vae(0.06), encoder, tokenizer, transformer)


def tiny_ideogram4(seed: int = 0):
    from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel

    torch.manual_seed(seed)
    encoder, tokenizer = tiny_qwen3_vl(layers=36, parts=True)
    conditional, unconditional = (
        Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            intermediate_size=16,
            adaln_dim=16,
            llm_features_dim=13 * 16,
            mrope_section=(1, 1, 1),
        )
        for _ in range(2)
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return Ideogram4Pipeline(scheduler, tiny_flux2_vae(), encoder, tokenizer, conditional, unconditional)


def spread(module: torch.nn.Module) -> None:
    """Give weights that a class leaves at zero or one some spread, as training would."""
    for parameter in module.parameters():
        if not (parameter.std() > 0) or parameter.numel() == 1:
            parameter.data += torch.randn(parameter.shape) * 0.1
