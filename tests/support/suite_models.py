"""Stand-ins for the models of the Hub that diffusers' own pipeline tests load: tokenizers and tiny models, made here.

They lie in a folder that has the layout of the Hub's cache, so that the tests find them offline by their names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.tiny_language import CHAT, tiny_qwen_tokenizer
from support.tiny_tokenizers import GEMMA_WORDS, tiny_gemma_tokenizer, tiny_t5_tokenizer, tiny_tokenizer

COMMIT = "0" * 40


def write_hub(cache: Path) -> None:
    """Write every stand-in into a cache folder (`HF_HUB_CACHE`)."""
    for name, save in STAND_INS.items():
        repository = cache / f"models--hf-internal-testing--{name}"
        snapshot = repository / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        save(snapshot)


def _clip(folder: Path) -> None:
    from transformers import CLIPTextConfig

    tiny_tokenizer(77).save_pretrained(folder)
    CLIPTextConfig(vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=4).save_pretrained(folder)


def _t5(folder: Path) -> None:
    import torch
    from transformers import T5Config, T5EncoderModel

    tiny_t5_tokenizer().save_pretrained(folder)
    config = T5Config(
        vocab_size=1103,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    T5EncoderModel(config).save_pretrained(folder)


def _gemma(folder: Path) -> None:
    tiny_gemma_tokenizer([*GEMMA_WORDS[:5], "a", "b", "c"]).save_pretrained(folder)  # their model knows eight words
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma"}))  # by which AutoTokenizer knows its class


def _qwen(folder: Path) -> None:
    from transformers import Qwen2VLConfig

    tiny_qwen_tokenizer().save_pretrained(folder)
    Qwen2VLConfig().save_pretrained(folder)


def _mistral(folder: Path) -> None:
    from transformers import PixtralImageProcessor, PixtralProcessor

    tokenizer = tiny_qwen_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    chat = CHAT.replace("message['content']", "message['content'][0]['text']")
    PixtralProcessor(PixtralImageProcessor(), tokenizer, patch_size=4, chat_template=chat).save_pretrained(folder)


STAND_INS: dict[str, Callable[[Any], None]] = {
    "tiny-random-clip": _clip,
    "tiny-random-t5": _t5,
    "dummy-gemma": _gemma,
    "tiny-random-Qwen2VLForConditionalGeneration": _qwen,
    "Mistral-Small-3.1-24B-Instruct-2503-only-processor": _mistral,
}
