"""Values of recipes and flags that were lost or taken for something else: texts that begin with #, empty paths."""

import pytest

from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import BankConfig, ControlConfig, DataConfig
from difftuning_control.verbs.parse import parse
from support.marks import needs


@needs("jsonargparse", "4.53")  # 4.49 reads a value again, with its own loader
@pytest.mark.parametrize("text", ["#cats", "# of cats"])
def test_a_text_that_begins_with_a_hash_is_no_comment(tmp_path, text):
    (tmp_path / "r.yaml").write_text(f"# mine\ndata:\n  path: a\n  default_caption: '{text}'  # a caption\n")
    assert parse(["train", "--config", str(tmp_path / "r.yaml")])[1].data.default_caption == text
    assert parse(["train", "--data.path=a", f"--data.default_caption={text}"])[1].data.default_caption == text
    assert parse(["train", "--data.path=a", "--data.default_caption=null"])[1].data.default_caption is None


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        (DataConfig, {"validation_path": ""}, "data.validation_path"),
        (DataConfig, {"cache": ""}, "data.cache"),
        (BankConfig, {"path": ""}, "bank.path"),
        (ControlConfig, {"annotator": "supplied", "path": ""}, "control.path"),
        (ControlConfig, {"init": ""}, "control.init"),
    ],
)
def test_an_empty_path_is_not_the_folder_that_one_is_in(section, values, key):
    with pytest.raises(UserError, match=rf"^{key} is empty; expected a .*, or null\.$"):
        section(**values)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_a_recipe_in_utf_16_is_told_so_with_and_without_a_mark(tmp_path, encoding):
    (tmp_path / "r.yaml").write_bytes("data: {path: a}\n".encode(encoding))
    with pytest.raises(UserError, match=r"r\.yaml is not UTF-8 text; save it as UTF-8"):
        parse(["train", "--config", str(tmp_path / "r.yaml")])
