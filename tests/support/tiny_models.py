"""A tiny real pipeline of every family beside Stable Diffusion, made from seeds: 16×16 pictures, 8×8 latents."""

from __future__ import annotations

import torch

from support.tiny_sd import tiny_xl_pipeline
from support.tiny_tokenizers import tiny_gemma_tokenizer, tiny_t5_tokenizer, tiny_tokenizer


def tiny_vae(shift_factor: float | None, sharp: bool = False, halvings: int = 1):
    """An autoencoder that halves pictures, so many times; `sharp` has no spread around the mean."""
    from diffusers import AutoencoderKL

    blocks = halvings + 1
    vae = AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
        scaling_factor=0.7,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
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
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=16,
    )
    return (CLIPTextModelWithProjection if pooled else CLIPTextModel)(config), tokenizer


def tiny_t5(width: int = 32):
    """A T5 encoder and its tokenizer of single letters."""
    from transformers import T5Config, T5EncoderModel

    tokenizer = tiny_t5_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config), tokenizer


def tiny_sdxl(seed: int = 0, prediction_type: str = "epsilon", sharp: bool = False):
    """`tiny_xl_pipeline`, and perhaps with an autoencoder that has no spread."""
    pipe = tiny_xl_pipeline(seed, prediction_type)
    if sharp:
        sharpen(pipe.vae)
    return pipe


def tiny_sd3(seed: int = 0, t5: bool = True, sharp: bool = False):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    (one, first), (two, second), (three, third) = tiny_clip(True), tiny_clip(True), tiny_t5()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(0.06, sharp),
        text_encoder=one,
        tokenizer=first,
        text_encoder_2=two,
        tokenizer_2=second,
        text_encoder_3=three if t5 else None,
        tokenizer_3=third if t5 else None,
    )


def tiny_flux(seed: int = 0, dev: bool = True, sharp: bool = False):
    """`dev` is told a guidance scale and shifts its timesteps by resolution; schnell does neither."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    (one, first), (two, second) = tiny_clip(), tiny_t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=dev,
        axes_dims_rope=(2, 2, 4),
    )
    shifting = {"use_dynamic_shifting": True, "shift": 3.0} if dev else {"shift": 1.0}
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**shifting),
        vae=tiny_vae(0.06, sharp),
        text_encoder=one,
        tokenizer=first,
        text_encoder_2=two,
        tokenizer_2=second,
    )


DIT_CLASSES = ("ant", "bee", "cat", "dog")


def tiny_dit(seed: int = 0, variance: bool = True, classes: int = 1000, names: tuple[str, ...] = DIT_CLASSES):
    """`variance` predicts it beside ε; `classes` is the size of the tables, in which `names` have a row each."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8 if variance else 4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=classes,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    return DiTPipeline(transformer, tiny_vae(None), scheduler, id2label=dict(enumerate(names)))


def tiny_pixart(seed: int = 0, variance: bool = True, alpha: bool = False):
    """`alpha` is told the size of its pictures, at which it then has 128 latents a side; Σ has 8."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(seed)
    encoder, tokenizer = tiny_t5()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=6,
        in_channels=4,
        out_channels=8 if variance else 4,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=128 if alpha else 8,
        patch_size=2,
        caption_channels=32,
        norm_num_groups=4,
    )
    return (PixArtAlphaPipeline if alpha else PixArtSigmaPipeline)(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=tiny_vae(None),
        transformer=transformer,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
    )


def tiny_gemma():
    """A Gemma 2 model and its tokenizer of single letters."""
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = tiny_gemma_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return Gemma2Model(config), tokenizer


def tiny_sana(seed: int = 0, timestep_scale: float = 1.0, layers: int = 2):
    """32×32 pictures, as small as its pipeline takes; latents of 16×16 without a spread."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    torch.manual_seed(seed)
    encoder, tokenizer = tiny_gemma()
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=layers,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=16,
        patch_size=1,
        timestep_scale=timestep_scale,
    )
    scheduler = DPMSolverMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    return SanaPipeline(tokenizer, encoder, vae, transformer, scheduler)


def tiny_lumina2(seed: int = 0, dynamic: bool = False):
    """64×64 pictures and latents of 8×8: its pipeline knows no other factor."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    torch.manual_seed(seed)
    encoder, tokenizer = tiny_gemma()
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0, use_dynamic_shifting=dynamic)
    return Lumina2Pipeline(transformer, scheduler, tiny_vae(0.06, halvings=3), encoder, tokenizer)
