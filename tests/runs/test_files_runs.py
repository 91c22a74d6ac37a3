"""What is said of a place that holds no run."""

import pytest

from difftuning_control.errors import UserError
from difftuning_control.recipe.requests import VerifyRequest
from difftuning_control.runs.verify import verify


def test_a_file_is_no_run_to_verify(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match=r"run holds no run \(no readable run\.json\); give the output folder"):
        verify(VerifyRequest(run=str(tmp_path / "run")))
