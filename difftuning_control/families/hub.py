"""Loading from disk or the Hub without noise, and the reason why a load failed in a few words."""

from __future__ import annotations

import gc
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from difftuning_control.system.installed import at_least


def why_not(error: BaseException) -> str:
    """Why the Hub gave nothing, in a few words; of its many errors only what lies behind them tells."""
    from huggingface_hub import constants  # saves it where nothing fails to load

    behind, chain = error, [error]
    while (nearest := behind.__cause__ or behind.__context__) is not None and nearest not in chain:
        chain.append(behind := nearest)
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if constants.HF_HUB_OFFLINE:
        return "offline mode is on: HF_HUB_OFFLINE"
    if names & {"RepositoryNotFoundError", "HFValidationError", "RevisionNotFoundError"}:
        return "the Hub has none of this name, or it is private"
    if names & {
        "OfflineModeIsEnabled",
        "ConnectError",
        "ConnectionError",
        "ConnectTimeout",
        "ReadTimeout",
        "Timeout",
        "LocalEntryNotFoundError",
    }:
        return "the Hub cannot be reached"
    return textwrap.shorten(str(error), 120, placeholder=" …").rstrip(". ") or type(error).__name__


def best_device() -> torch.device:
    """The GPU that there is, or the CPU: where sampling and measuring happen outside of a training run."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def free_memory() -> None:
    """Give back the memory of models that nobody uses any more: each refers to itself, so that they stay, on a GPU too,
    until Python looks for such cycles, which too little memory there does not make it do."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def in_precision(dtype: Any) -> dict[str, Any]:
    """A precision as `from_pretrained` and `from_pipe` take it: diffusers before 0.40 passes over `dtype`, unsaid."""
    return {"dtype" if at_least("diffusers", "0.40") else "torch_dtype": dtype}


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No warnings about the safety checker, renamed arguments and each attempt to reach the Hub, no bars for each
    component but for downloads."""
    import diffusers.utils.logging as diffusers_logging  # these save diffusers where no model is loaded
    import huggingface_hub.utils.logging as hub_logging
    import transformers.utils.logging as transformers_logging

    level, hub_level = diffusers_logging.get_verbosity(), hub_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    shown = [m for m in (diffusers_logging, transformers_logging) if m.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks", category=UserWarning)
            yield
    finally:
        diffusers_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        for module in shown:
            module.enable_progress_bar()
