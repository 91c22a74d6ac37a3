"""Names of files and folders that every system takes, those on Windows too."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import LoraConfig

from difftuning_control.adapters.snapshot import load_adapters, save_adapters
from difftuning_control.system.durable import discard, sweep
from difftuning_control.system.text import portable_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("icons", "icons"),
        ("My run_1.2", "My run_1.2"),
        ("赤い", "赤い"),
        ('a:b*c?"d', "a-b-c--d"),
        ("back\\slash", "back-slash"),
        ("ends. ", "ends"),
        ("...", "empty"),
        ("con", "con-"),
        ("LPT1.x", "LPT1.x-"),
        ("console", "console"),
    ],
)
def test_a_name_has_nothing_that_windows_forbids(name, expected):
    assert portable_name(name) == expected


def test_adapters_lie_in_folders_that_differ_in_more_than_capitals(pipe, tmp_path):
    names = ["Style", "style", "con", "4-adapter", "a b"]
    for name in names:
        pipe.unet.add_adapter(LoraConfig(r=1, target_modules=["to_q"], init_lora_weights=False), adapter_name=name)
    save_adapters(pipe, names, tmp_path / "adapters")
    folders = [p.name for p in (tmp_path / "adapters").iterdir() if p.is_dir()]
    assert len({folder.lower() for folder in folders}) == len(names)
    assert {"Style", "con"} & set(folders) == {"Style"}
    before = {n: p.clone() for n, p in pipe.unet.named_parameters() if ".lora_" in n}
    pipe.unet.delete_adapters(names)
    load_adapters(pipe, tmp_path / "adapters")
    after = dict(pipe.unet.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_cannot_be_deleted_yet_ends_nothing_and_goes_later(tmp_path, monkeypatch):
    """As on a network disk, where another program has a file open."""
    folder, real = tmp_path / "checkpoint-1", shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else real(path))
        for _ in range(2):
            (folder / "open").mkdir(parents=True)
            discard(folder)
            sweep(tmp_path)
        assert not folder.exists()
        assert len(list(tmp_path.iterdir())) == 2
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
