"""What the code that a model was published in calls each of diffusers' layers; other tools keep those names.

    diffusers                                          published
    transformer_blocks.0.attn.to_q, .to_k, .to_v       double_blocks.0.img_attn.qkv     FLUX
    down_blocks.1.attentions.0…                        input_blocks.4.1…                UNets, see `ldm_names`

Several of diffusers' layers may be the rows of one published layer, one after the other. Where diffusers has the scale
before the shift, the published layer's two halves of rows are the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusers.utils.torch_utils import unwrap_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from difftuning_control.adapters.ldm_names import ldm_names
from difftuning_control.errors import UserError


@dataclass(frozen=True)
class Published:
    """A published layer.

    Args:
        name: of its module.
        modules: diffusers' layers, whose rows it has one after the other.
        is_swapped: whether the first half of its rows is the second one of diffusers'.
    """

    name: str
    modules: tuple[str, ...]
    is_swapped: bool = False


@dataclass(frozen=True)
class Architecture:
    """The names of a transformer.

    Args:
        blocks: by diffusers' name of a list of blocks the published one, and the layers in each: diffusers' names, by
            spaces where there are several, and the published name.
        outside: the same for what lies in no block.
        swapped: diffusers' layers whose halves are the other way round; that of a last block by `{}`.
    """

    blocks: dict[str, tuple[str, dict[str, str]]]
    outside: dict[str, str]
    swapped: tuple[str, ...] = ()

    def layers(self, modules: set[str]) -> Iterator[Published]:
        """The published layers of a transformer that has these modules."""
        for names, published in self.outside.items():
            yield from self._there(modules, published, tuple(names.split()), "")
        for ours, (theirs, inside) in self.blocks.items():
            inner = [m.removeprefix(f"{ours}.") for m in modules if m.startswith(f"{ours}.")]
            last = max((int(m.split(".")[0]) for m in inner), default=-1)
            for i in range(last + 1):
                for names, published in inside.items():
                    each = tuple(f"{ours}.{i}.{name}" for name in names.split())
                    yield from self._there(modules, f"{theirs}.{i}.{published}", each, f"{ours}.{last}.")

    def _there(self, modules: set[str], published: str, names: tuple[str, ...], last: str) -> Iterator[Published]:
        if all(name in modules for name in names):
            of_last = "{}." + names[0].removeprefix(last) if last and names[0].startswith(last) else names[0]
            yield Published(published, names, names[0] in self.swapped or of_last in self.swapped)


QKV, ADDED = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
EMBEDDERS = {"linear_1": "in_layer", "linear_2": "out_layer"}
FLUX = Architecture(
    {
        "transformer_blocks": (
            "double_blocks",
            {
                QKV: "img_attn.qkv",
                ADDED: "txt_attn.qkv",
                "attn.to_out.0": "img_attn.proj",
                "attn.to_add_out": "txt_attn.proj",
                "norm1.linear": "img_mod.lin",
                "norm1_context.linear": "txt_mod.lin",
                "ff.net.0.proj": "img_mlp.0",
                "ff.net.2": "img_mlp.2",
                "ff_context.net.0.proj": "txt_mlp.0",
                "ff_context.net.2": "txt_mlp.2",
            },
        ),
        "single_transformer_blocks": (
            "single_blocks",
            {f"{QKV} proj_mlp": "linear1", "proj_out": "linear2", "norm.linear": "modulation.lin"},
        ),
    },
    {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        **{f"time_text_embed.timestep_embedder.{a}": f"time_in.{b}" for a, b in EMBEDDERS.items()},
        **{f"time_text_embed.text_embedder.{a}": f"vector_in.{b}" for a, b in EMBEDDERS.items()},
        **{f"time_text_embed.guidance_embedder.{a}": f"guidance_in.{b}" for a, b in EMBEDDERS.items()},
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    ("norm_out.linear",),
)
FLUX2 = Architecture(
    {
        "transformer_blocks": (
            "double_blocks",
            {
                QKV: "img_attn.qkv",
                ADDED: "txt_attn.qkv",
                "attn.to_out.0": "img_attn.proj",
                "attn.to_add_out": "txt_attn.proj",
                "ff.linear_in": "img_mlp.0",
                "ff.linear_out": "img_mlp.2",
                "ff_context.linear_in": "txt_mlp.0",
                "ff_context.linear_out": "txt_mlp.2",
            },
        ),
        "single_transformer_blocks": (
            "single_blocks",
            {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"},
        ),
    },
    {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        **{f"time_guidance_embed.timestep_embedder.{a}": f"time_in.{b}" for a, b in EMBEDDERS.items()},
        **{f"time_guidance_embed.guidance_embedder.{a}": f"guidance_in.{b}" for a, b in EMBEDDERS.items()},
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    ("norm_out.linear",),
)
SD3 = Architecture(
    {
        "transformer_blocks": (
            "joint_blocks",
            {
                QKV: "x_block.attn.qkv",
                ADDED: "context_block.attn.qkv",
                QKV.replace("attn.", "attn2."): "x_block.attn2.qkv",
                "attn.to_out.0": "x_block.attn.proj",
                "attn2.to_out.0": "x_block.attn2.proj",
                "attn.to_add_out": "context_block.attn.proj",
                "norm1.linear": "x_block.adaLN_modulation.1",
                "norm1_context.linear": "context_block.adaLN_modulation.1",
                "ff.net.0.proj": "x_block.mlp.fc1",
                "ff.net.2": "x_block.mlp.fc2",
                "ff_context.net.0.proj": "context_block.mlp.fc1",
                "ff_context.net.2": "context_block.mlp.fc2",
            },
        )
    },
    {
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    ("norm_out.linear", "{}.norm1_context.linear"),
)
NEXT_DIT = {
    QKV: "attention.qkv",
    "attn.to_out.0": "attention.out",
    "feed_forward.linear_1": "feed_forward.w1",
    "feed_forward.linear_2": "feed_forward.w2",
    "feed_forward.linear_3": "feed_forward.w3",
    "norm1.linear": "adaLN_modulation.1",
}
LUMINA2 = Architecture(
    {name: (name, NEXT_DIT) for name in ("layers", "noise_refiner", "context_refiner")},
    {
        "x_embedder": "x_embedder",
        "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_caption_embed.caption_embedder.1": "cap_embedder.1",
        "norm_out.linear_1": "final_layer.adaLN_modulation.1",
        "norm_out.linear_2": "final_layer.linear",
    },
)
Z_BLOCK = {
    QKV.replace("attn.", "attention."): "attention.qkv",
    "attention.to_out.0": "attention.out",
    **{f"feed_forward.{w}": f"feed_forward.{w}" for w in ("w1", "w2", "w3")},
    "adaLN_modulation.0": "adaLN_modulation.0",
}
Z_IMAGE = Architecture(
    {name: (name, Z_BLOCK) for name in ("layers", "noise_refiner", "context_refiner")},
    {
        "all_x_embedder.2-1": "x_embedder",
        "t_embedder.mlp.0": "t_embedder.mlp.0",
        "t_embedder.mlp.2": "t_embedder.mlp.2",
        "cap_embedder.1": "cap_embedder.1",
        "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    },
)
KREA2_BLOCK = {
    **{f"attn.to_{ours}": f"attn.w{ours}" for ours in ("q", "k", "v")},
    "attn.to_gate": "attn.gate",
    "attn.to_out.0": "attn.wo",
    **{f"ff.{part}": f"mlp.{part}" for part in ("gate", "up", "down")},
}
KREA2 = Architecture(
    {
        "transformer_blocks": ("blocks", KREA2_BLOCK),
        "text_fusion.layerwise_blocks": ("txtfusion.layerwise_blocks", KREA2_BLOCK),
        "text_fusion.refiner_blocks": ("txtfusion.refiner_blocks", KREA2_BLOCK),
    },
    {
        "img_in": "first",
        "time_embed.linear_1": "tmlp.0",
        "time_embed.linear_2": "tmlp.2",
        "time_mod_proj": "tproj.1",
        "txt_in.linear_1": "txtmlp.1",
        "txt_in.linear_2": "txtmlp.3",
        "text_fusion.projector": "txtfusion.projector",
        "final_layer.linear": "last.linear",
    },
)
QWEN_IMAGE21 = Architecture(
    {
        "transformer_blocks": (
            "transformer_blocks",
            {
                **{f"attn.to_{part}": f"attn.to_{part}" for part in ("q", "k", "v", "out.0")},
                "img_mlp.gate_layer img_mlp.proj": "img_mlp.gate_up",
                "img_mlp.out": "img_mlp.out",
            },
        )
    },
    {
        name: name
        for name in (
            *("img_in", "txt_in.in_layer", "txt_in.out_layer", "modulation.1", "norm_out.linear", "proj_out"),
            *(f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)),
        )
    },
)
IDEOGRAM4_OUTSIDE = ("input_proj", "llm_cond_proj", "t_embedding.mlp_in", "t_embedding.mlp_out", "adaln_proj")
IDEOGRAM4 = Architecture(
    {
        "layers": (
            "layers",
            {
                QKV.replace("attn.", "attention."): "attention.qkv",
                "attention.to_out.0": "attention.o",
                **{f"feed_forward.{w}": f"feed_forward.{w}" for w in ("w1", "w2", "w3")},
                "adaln_modulation": "adaln_modulation",
            },
        )
    },
    {name: name for name in (*IDEOGRAM4_OUTSIDE, "final_layer.linear", "final_layer.adaln_modulation")},
)
PIXART = Architecture(
    {
        "transformer_blocks": (
            "blocks",
            {
                QKV.replace("attn.", "attn1."): "attn.qkv",
                "attn1.to_out.0": "attn.proj",
                "attn2.to_q": "cross_attn.q_linear",
                "attn2.to_k attn2.to_v": "cross_attn.kv_linear",
                "attn2.to_out.0": "cross_attn.proj",
                "ff.net.0.proj": "mlp.fc1",
                "ff.net.2": "mlp.fc2",
            },
        )
    },
    {
        "pos_embed.proj": "x_embedder.proj",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "adaln_single.linear": "t_block.1",
        "proj_out": "final_layer.linear",
    },
)
TRANSFORMERS = {
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX2,
    "SD3Transformer2DModel": SD3,
    "Lumina2Transformer2DModel": LUMINA2,
    "ZImageTransformer2DModel": Z_IMAGE,
    "PixArtTransformer2DModel": PIXART,
    "ChromaTransformer2DModel": FLUX,  # whose blocks it has
    "Krea2Transformer2DModel": KREA2,
    "Ideogram4Transformer2DModel": IDEOGRAM4,
    "QwenImage21Transformer2DModel": QWEN_IMAGE21,
}
AS_IN_DIFFUSERS = ("QwenImageTransformer2DModel",)  # published in diffusers first


def plain_layers(module: nn.Module) -> dict[str, Any]:
    """The layers of a model that can bear a LoRA, by the names that they have without adapters."""
    plain_ones: dict[str, Any] = {}
    for name, layer in module.named_modules():
        if ".base_layer" in name or ".lora_" in name:
            continue
        plain = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        if isinstance(plain, (nn.Linear, nn.Conv2d)):
            plain_ones[name] = plain
    return plain_ones


def published_layers(denoiser: Any, wanted: list[str]) -> list[Published]:
    """The published layers of a denoiser that some of diffusers' layers are in.

    Args:
        wanted: diffusers' names of these layers.

    Raises:
        UserError: if the model's names are not known, or it has none for a layer.
    """
    name = type(unwrap_module(denoiser)).__name__
    if "down_block_types" in denoiser.config:
        return [Published(theirs, (ours,)) for ours, theirs in ldm_names(wanted, denoiser.config).items()]
    if name in AS_IN_DIFFUSERS:
        return [Published(module, (module,)) for module in wanted]
    known = [p for p in known_layers(denoiser) if set(p.modules) & set(wanted)]
    strange = sorted(set(wanted) - {m for p in known for m in p.modules})
    if strange:
        raise UserError(f"the published {name} has no name for {strange[0]}; use --format diffusers.")
    return known


def known_layers(denoiser: Any) -> list[Published]:
    """Every published layer of a denoiser.

    Raises:
        UserError: if the model's names are not known.
    """
    name, layers = type(unwrap_module(denoiser)).__name__, plain_layers(denoiser)
    if "down_block_types" in denoiser.config or name in AS_IN_DIFFUSERS:
        return published_layers(denoiser, list(layers))
    if name not in TRANSFORMERS:
        known = ", ".join(["UNets", *TRANSFORMERS, *AS_IN_DIFFUSERS])
        raise UserError(
            f"how other tools name the layers of a {name} is not known (known: {known}); use --format diffusers."
        )
    return list(TRANSFORMERS[name].layers(set(layers)))


# --- text encoders --------------------------------------------------------------------------------------------------


def encoder_names(pipe: Any) -> dict[str, tuple[str, str]]:
    """What other tools call a pipeline's text encoders, by diffusers' name: kohya's prefix and ComfyUI's module."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    name = type(unwrap_module(denoiser)).__name__
    if "down_block_types" in denoiser.config:
        if getattr(pipe, "text_encoder_2", None) is not None:
            return {"text_encoder": ("lora_te1", "clip_l"), "text_encoder_2": ("lora_te2", "clip_g")}
        width = getattr(getattr(pipe.text_encoder, "config", None), "hidden_size", None)
        return {"text_encoder": ("lora_te", "clip_h" if width == 1024 else "clip_l")}  # Stable Diffusion 2's is large
    if name.startswith("SD3"):
        return {
            "text_encoder": ("lora_te1", "clip_l"),
            "text_encoder_2": ("lora_te2", "clip_g"),
            "text_encoder_3": ("lora_te3", "t5xxl"),
        }
    if name.startswith("FluxT"):
        return {"text_encoder": ("lora_te1", "clip_l"), "text_encoder_2": ("lora_te3", "t5xxl")}
    return {}


def encoder_layer(module: Any, name: str) -> str:
    """A text encoder's layer by the name that other tools know: transformers has left `text_model` out of CLIP's."""
    is_clip = type(module).__name__.startswith("CLIP")
    return f"text_model.{name}" if is_clip and not name.startswith(("text_model.", "text_projection")) else name
