"""The kinds of adapter: what each is to peft, which layers it fits, and how it is put on a model."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft import get_peft_model_state_dict
from peft.tuners.lokr.layer import factorization
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from difftuning_control.adapters.lora_start import Down, factors, subtract_start
from difftuning_control.adapters.tlora import RankMask, orthogonal_start, rank_limits
from difftuning_control.errors import UserError
from difftuning_control.families.tunable import make_tunable
from difftuning_control.recipe.adapter_kinds import KINDS, LORA_KINDS

if TYPE_CHECKING:
    from difftuning_control.objective.noise import NoiseProcess
    from difftuning_control.recipe.adapter import AdapterConfig

ADAPTER = "default"
OWN = "_difftuning_adapters"
BESIDE = "{} beside"  # the name of what trains whole beside an adapter
LAYERS = (nn.Linear, nn.Conv2d)
LINEAR_ONLY = "fits linear layers only"


def peft_config(config: AdapterConfig, targets: list[str]) -> Any:
    """The configuration that peft knows a kind by."""
    rank = config.full_rank
    alpha = rank if config.alpha is None else config.alpha
    if config.kind in LORA_KINDS:
        init = {"pissa": "pissa", "orthogonal": "orthogonal"}.get(config.init or "", "gaussian")
        settings: Any = {"r": rank, "lora_alpha": alpha, "lora_dropout": config.dropout, "use_rslora": config.rslora}
        settings |= {"init_lora_weights": "gaussian" if config.kind == "tlora" else init}
        return peft.LoraConfig(target_modules=targets, use_dora=config.kind == "dora", **settings)
    if config.kind == "loha":
        return peft.LoHaConfig(target_modules=targets, r=rank, alpha=alpha)  # type: ignore[arg-type]
    if config.kind == "lokr":
        whole = config.rank is None  # peft trains the second factor whole where the rank is large
        size = {"r": 10**6, "alpha": 10**6} if whole else {"r": rank, "alpha": alpha}
        return peft.LoKrConfig(target_modules=targets, decompose_factor=config.factor or -1, **size)
    if config.kind == "ia3":
        return peft.IA3Config(target_modules=targets, feedforward_modules=[])
    block = config.block_size or KINDS[config.kind].block_size
    if config.kind == "boft":
        return peft.BOFTConfig(target_modules=targets, boft_block_size=block)
    return peft.OFTConfig(target_modules=targets, oft_block_size=block, use_cayley_neumann=False)


def target_layers(
    module: nn.Module, config: AdapterConfig, default: tuple[str, ...]
) -> tuple[list[str], dict[str, Any]]:
    """The names that a recipe targets, and the layers that bear them.

    Raises:
        UserError: unless every name is borne by linear or convolution modules only, and each of them fits the kind.
    """
    names = list(default) if config.targets == "auto" else [n.strip() for n in config.targets.split(",") if n.strip()]
    modules = dict(module.named_modules())
    named = {t: {n: m for n, m in modules.items() if n == t or n.endswith(f".{t}")} for t in names}
    unknown = [
        t for t, matches in named.items() if not matches or not all(isinstance(m, LAYERS) for m in matches.values())
    ]
    if unknown or not names:
        raise UserError(
            f"adapter.targets names {', '.join(unknown) or 'nothing'}, which are no linear or convolution modules of "
            f"what is tuned; expected names such as {', '.join(default)}, or auto."
        )
    layers = {n: m for matches in named.values() for n, m in matches.items()}
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d):
            _check_convolution(config, name, layer)
    sizes = {name: _size(layer) for name, layer in layers.items()}
    if config.kind in ("oft", "boft"):
        _check_blocks(config, sizes)
    elif config.kind == "lokr" and config.rank is not None:
        _check_kronecker(config.rank, config.factor, layers)
    elif config.kind in (*LORA_KINDS, "loha"):
        _check_rank(config.full_rank, sizes)
    return names, layers


def target_names(module: nn.Module, layers: set[str]) -> list[str] | None:
    """The shortest names by which `target_layers` finds these layers and no others; None where it finds others too."""
    modules = [name for name, _ in module.named_modules()]
    names: list[str] = []
    for layer in sorted(layers):
        if any(layer == name or layer.endswith(f".{name}") for name in names):
            continue
        parts = layer.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))
        short = (e for e in ends if all(m in layers for m in modules if m == e or m.endswith(f".{e}")))
        name = next(short, None)
        if name is None:
            return None
        names.append(name)
    return names


def _size(layer: Any) -> tuple[int, int]:
    """Rows and columns of a layer's weight, as a matrix; a quantised one is packed."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return len(layer.weight), layer.weight[0].numel()


def _check_rank(rank: int, sizes: dict[str, tuple[int, int]]) -> None:
    name, (out, into) = min(sizes.items(), key=lambda item: min(item[1]))
    if rank > min(out, into):
        raise UserError(
            f"adapter.rank is {rank}, but {name} is {out} × {into}; expected at most {min(out, into)}, or other "
            "adapter.targets."
        )


def _check_convolution(config: AdapterConfig, name: str, layer: nn.Conv2d) -> None:
    reason = None
    if layer.groups > 1 or set(layer.dilation) != {1}:
        reason = "fits no grouped or dilated convolutions"
    elif config.kind == "tlora":
        reason = LINEAR_ONLY
    elif config.init in ("pissa", "orthogonal"):
        reason = f"with init {config.init} {LINEAR_ONLY}"
    elif config.kind == "oft" and set(layer.kernel_size) != {1}:
        reason = "fits no convolutions wider than 1 × 1"  # peft's fold adds up what overlaps: it is not the base then
    if reason is not None:
        raise UserError(f"adapter.targets names {name}, a convolution, but kind {config.kind} {reason}.")


def _check_blocks(config: AdapterConfig, sizes: dict[str, tuple[int, int]]) -> None:
    block = config.block_size or KINDS[config.kind].block_size
    common = math.gcd(*(into for _, into in sizes.values()))
    for name, (_, into) in sizes.items():
        if into % block:
            raise UserError(
                f"adapter.block_size is {block}, which does not divide the {into} inputs of {name}; the inputs of all "
                f"targets are multiples of {common}."
            )


def _check_kronecker(rank: int, factor: int | None, layers: dict[str, Any]) -> None:
    for name, layer in layers.items():
        out, into = (factorization(size, factor or -1)[1] for size in layer.weight.shape[:2])
        if 2 * rank >= max(out, into):
            raise UserError(
                f"adapter.rank is {rank}, but the second Kronecker factor of {name} is {out} × {into}, which trains "
                f"whole from rank {math.ceil(max(out, into) / 2)} on; leave adapter.rank out for that, or lower it."
            )


def attach(
    module: Any, config: AdapterConfig, seed: int, default: tuple[str, ...], process: NoiseProcess | None = None
) -> None:
    """Freeze a model and put an adapter of one of peft's kinds on it; what is random is drawn from `seed`.

    Args:
        default: names of the layers that `auto` stands for.
        process: of the denoiser, for kind tlora.

    Raises:
        UserError: if the targets are not there or do not fit the kind.
    """
    make_tunable(module)
    names, layers = target_layers(module, config, default)
    module.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's BOFT warns of its CUDA kernel, which is not needed
        torch.manual_seed(seed)
        weights = {name: layer.weight.data for name, layer in layers.items() if config.init == "pissa"}
        module.add_adapter(peft_config(config, names), ADAPTER)
        for name, weight in weights.items():
            layers[name].weight.data = weight  # PiSSA's initialisation takes its part out of it
        tuned = {name: module.get_submodule(name) for name in layers}
        if config.kind == "tlora" and config.init != "gaussian":
            _start_orthogonally(tuned, config.full_rank)
        elif config.init == "pissa":
            for layer in tuned.values():
                subtract_start(layer, ADAPTER)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if config.kind == "tlora":
        assert process is not None
        limits = rank_limits(process, config.full_rank, config.lowest_rank)
        mask_ranks(module, ADAPTER, config.full_rank, limits, process.time_sign)


def mask_ranks(denoiser: Any, name: str, rank: int, limits: list[float], sign: int = 1) -> None:
    """Put the mask of a T-LoRA on its layers."""
    layers = [m for m in denoiser.modules() if isinstance(m, LoraLayer) and name in m.lora_A]
    runs = len(factors(layers[0], name)[0]) // rank  # two where its start is subtracted
    mask = RankMask(denoiser, rank, limits, runs, sign)
    for layer in layers:
        mask.cover(layer.lora_A[name])
    keep_part(denoiser, name, mask)


def own_parts(module: Any) -> dict[str, Any]:
    """What this package has put on a denoiser beside peft's layers, a `RankMask` or a `DiffFit` by adapter name.

    Of a compiled denoiser, which is a module around it, those of the denoiser itself.
    """
    return vars(getattr(module, "_orig_mod", module)).get(OWN, {})


def keep_part(module: Any, name: str, part: Any) -> None:
    """Add to what `own_parts` gives."""
    vars(getattr(module, "_orig_mod", module)).setdefault(OWN, {})[name] = part


def _start_orthogonally(layers: dict[str, Any], rank: int) -> None:
    """A, S and B of a T-LoRA; S trains beside A."""
    shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
    for layer, (a, s, b) in zip(layers.values(), orthogonal_start(shapes, rank)):
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        down.weight.data, up.weight.data = a.to(down.weight.device), b.to(up.weight.device)
        subtract_start(layer, ADAPTER, s)


def lora_state(module: Any, name: str = ADAPTER) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What diffusers saves of a LoRA: its tensors, float32, and its configuration.

    A start that was subtracted becomes part of it, which then has twice the rank.
    """
    config = module.peft_config[name].to_dict()
    if not isinstance(config["target_modules"], str):
        config["target_modules"] = sorted(config["target_modules"])  # a set, whose order changes from run to run
    if config["init_lora_weights"] != "gaussian":
        config["init_lora_weights"] = True  # whoever loads it has no start to make
    layers = {n: m for n, m in module.named_modules() if isinstance(m, LoraLayer) and name in m.lora_A}
    some = next(iter(layers.values()))
    if not isinstance(some.lora_A[name], Down):
        tensors = get_peft_model_state_dict(module, adapter_name=name)
        return {k: v.float() for k, v in tensors.items()}, config
    tensors = {}
    for place, layer in layers.items():
        tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"] = factors(layer, name)
    rank = 2 * config["r"]
    return tensors, config | {"r": rank, "lora_alpha": some.scaling[name] * rank, "use_rslora": False}
