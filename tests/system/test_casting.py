"""Tensors in another precision."""

from __future__ import annotations

import pytest
import torch

from difftuning_control.errors import UserError
from difftuning_control.system.tensors import cast_tensors


def test_values_that_a_precision_does_not_have_are_told_and_not_made_infinite():
    tensors = {"small": torch.ones(2), "large": torch.tensor([1.0, 1e5])}
    assert cast_tensors(tensors, torch.bfloat16)["large"].dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"large has values that are too large for torch.float16; give --dtype"):
        cast_tensors(tensors, torch.float16)
