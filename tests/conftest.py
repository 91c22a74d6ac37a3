"""Fixtures of all tests: a tiny real model, pictures and a recipe, made from seeds; nothing is downloaded."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only slow tiny tensors down
os.environ["HF_HUB_OFFLINE"] = "1"
CACHE = TemporaryDirectory(prefix="difftuning-tests-")  # so that what lies in this machine's caches changes no test
HUB = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_MODULES_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE")
for name in (*HUB, "HF_DATASETS_CACHE", "TORCH_HOME", "TRANSFORMERS_CACHE"):
    os.environ.pop(name, None)
os.environ |= {"HF_HOME": f"{CACHE.name}/huggingface", "XDG_CACHE_HOME": CACHE.name}

pytest.register_assert_rewrite("support")  # so that a failed assert in a helper shows its values

from support.pictures import write_pictures  # noqa: E402
from support.tiny_sd import tiny_pipeline  # noqa: E402


@pytest.fixture(scope="session")
def connected() -> Iterator[list[str]]:
    """Refuses connections to other machines; gives the addresses, of threads too."""
    asked: list[str] = []

    def near(method: Any) -> Any:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                host = str(address[0])
                if host not in ("localhost", "::1") and not host.startswith("127."):
                    asked.append(str(address))
                    pytest.fail(f"the network was used: {address}")
            return method(self, address)

        return connect

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, near(getattr(socket.socket, name)))
        yield asked


@pytest.fixture(autouse=True)
def no_network(connected: list[str]) -> Iterator[None]:
    yield
    asked = [*connected]
    connected.clear()
    assert asked == [], "the network was used"


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.fixture
def family(pipe):
    from difftuning_control.families.loading import family_of

    return family_of(pipe)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture
def recipe(tmp_path: Path, model_dir: Path, pictures: Path):
    """A recipe that trains the tiny model for a few steps."""
    from difftuning_control.recipe.inputs import BankConfig, DataConfig, ModelConfig
    from difftuning_control.recipe.recipe import Recipe
    from difftuning_control.recipe.training import TrainingConfig

    return Recipe(
        model=ModelConfig(str(model_dir)),
        data=DataConfig(str(pictures), holdout=0.25, cache=str(tmp_path / "cache")),
        bank=BankConfig(size=10, steps=2, batch_size=4),
        training=TrainingConfig(
            max_steps=6,
            batch_size=5,
            checkpoint_every=2,
            validate_every=0,
            validation_size=2,
            sample_every=0,
            learning_rate=1e-2,
        ),
        output=str(tmp_path / "run"),
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share",
        type=int,
        default=1,
        metavar="N",
        help="of the `wide` instances of each test run one in N, spread evenly",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as `wide` what the `sample` marker of a parametrised test does not name; each name must name something."""
    unused: dict[str, set[str]] = {}
    for item in items:
        names = [name for mark in item.iter_markers("sample") for name in mark.args]
        if names and isinstance(item, pytest.Function):
            found = {name for name in names if fnmatchcase(item.callspec.id, name)}
            if not found:
                item.add_marker("wide")
            function = item.nodeid.partition("[")[0]
            unused[function] = unused.get(function, set(names)) - found
    whole = not any("::" in argument for argument in config.args)
    if stale := [f"{function}: {', '.join(sorted(names))}" for function, names in unused.items() if whole and names]:
        raise pytest.UsageError("the sample marker names no instance: " + "; ".join(stale))
    keep_a_share(config, items)


def keep_a_share(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out all but one in `--share` of each test's wide instances.

    Which one comes first differs from test to test, so that of every family, adapter and verb some tests are kept.
    """
    if (share := config.getoption("share")) < 1:
        raise pytest.UsageError(f"--share is {share}; it is one in how many: 1 or more")
    instances: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("wide"):
            instances.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {
        item
        for function, group in instances.items()
        for item in group[crc32(function.encode()) % share % len(group) :: share]
    }
    dropped = [item for group in instances.values() for item in group if item not in kept]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]
