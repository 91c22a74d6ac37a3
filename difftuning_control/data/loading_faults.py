"""Why `datasets` could not load a data set, in a sentence of its own where its reason is a known one."""

from __future__ import annotations

import ast
import errno
import re
from collections.abc import Iterator
from pathlib import Path

from difftuning_control.data.examples import listed
from difftuning_control.errors import UserError

CONFIGURATIONS = re.compile(r"Config name is missing.*?available configs: (\[.*?\])", re.DOTALL)
SCRIPT = re.compile(r"[Dd]ataset scripts are no longer supported(?:, but found (\S+))?")


def refuse_known(name: object, error: BaseException) -> None:
    """Say what is wrong where `datasets` says it, however it wraps that; other errors are left to the caller.

    Args:
        name: of the data set.

    Raises:
        UserError: where its cache cannot be written, or the data set of the Hub has several configurations, a licence
            that was not accepted, or a script.
    """
    for cause in _causes(error):
        _refuse_unwritable_cache(cause)
        text = str(cause)
        if (found := CONFIGURATIONS.search(text)) is not None:
            raise UserError(
                f"the data set {name} has several configurations ({_names(found[1])}); download the files of one into "
                f"a folder (hf download {name} --repo-type dataset --local-dir FOLDER), and give that."
            ) from None
        if "gated dataset" in text:
            raise UserError(
                f"the data set {name} is gated: accept its licence at https://huggingface.co/datasets/{name}, and log "
                "in with `hf auth login`."
            ) from None
        if (found := SCRIPT.search(text)) is not None:
            script = f" ({found[1]})" if found[1] else ""
            raise UserError(
                f"the data set {name} is made by a script{script}, which is never run; give one that was converted to "
                "Parquet files, or a folder of its pictures."
            ) from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _names(configurations: str) -> str:
    """The names of configurations as the library prints their list."""
    try:
        return listed(map(str, ast.literal_eval(configurations)))
    except (ValueError, SyntaxError):  # a name with a bracket, which cuts the list
        return configurations.strip("[]")


def _refuse_unwritable_cache(error: BaseException) -> None:
    import datasets  # saves a second where pictures lie in a folder

    place = datasets.config.HF_DATASETS_CACHE
    if not isinstance(error, OSError):
        return
    named = Path(str(error.filename))  # a folder above it, where that is to be made
    is_there = named.is_relative_to(place) or (named.is_absolute() and Path(place).is_relative_to(named))
    if error.errno in (errno.EROFS, errno.ENOSPC) or (error.errno == errno.EACCES and is_there):
        raise UserError(
            f"the cache of datasets, {place}, cannot be written ({error.strerror}); set HF_DATASETS_CACHE or "
            "HF_HOME to a folder that can."
        ) from None
