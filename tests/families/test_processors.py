"""Quantised layers and imports are the same on every processor; bitsandbytes asks for AVX512-BF16."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from difftuning_control.families.quantised import plain_state, quantise_linears

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
TESTS = Path(__file__).parent.parent


def quantised(outputs: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, outputs), nn.GELU(), nn.Linear(outputs, 8))
    quantise_linears(model, "nf4", torch.float32)
    return model


@pytest.mark.parametrize("outputs", [8, 32, 64])
def test_fault_15_00_nf4_is_the_same_with_and_without_avx512bf16(outputs, monkeypatch):
    import bitsandbytes as bnb

    if not hasattr(bnb.nn.modules, "has_avx512bf16"):
        pytest.skip("this bitsandbytes has one layout on every processor")
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    found = {}
    for capable in (False, True):
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda capable=capable: capable)
        model = quantised(outputs).eval()
        before = plain_state(model)
        with torch.no_grad():
            drawn = model(x)  # as sampling and validation do
        after = plain_state(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        model.train()
        trained = model(x.clone().requires_grad_())
        torch.testing.assert_close(trained, drawn, atol=1e-6, rtol=1e-6)
        found[capable] = drawn
    assert torch.equal(found[False], found[True])


@pytest.mark.wide
def test_fault_15_00_imports_print_nothing_on_such_a_processor():
    code = (
        "import support.avx512bf16, difftuning_control, peft, bitsandbytes\n"
        "from difftuning_control.verbs import train\n"
        "assert bitsandbytes.functional.has_avx512bf16()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
