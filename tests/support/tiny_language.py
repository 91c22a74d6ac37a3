"""Tiny language models as text encoders, made from seeds, with real tokenizers that know a few words."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

SPACED = "the image by detailing color shape size texture quantity text spatial relationships of objects background and"
WORDS = ("system", "user", "assistant", "Describe", *(f" {word}" for word in SPACED.split()))
"""Those of Qwen-Image's template: a token each, so that it has as many tokens as with the published tokenizer."""

CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)

IN_PARTS = CHAT.replace("message['content']", "message['content'][0]['text']")
PICTURE_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def tiny_qwen_tokenizer():
    """A Qwen tokenizer with Qwen's chat template: bytes, the words of `WORDS`, and the marks of a chat."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    tokens, merges = sorted(ByteLevel.alphabet()), []
    for word in WORDS:
        letters = word.replace(" ", "Ġ")
        for end in range(1, len(letters)):
            pair = (letters[:end], letters[end])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
    tokens += ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary, special = {t: i for i, t in enumerate(tokens)}, ["<|im_start|>", "<|im_end|>"]
    settings = {"model_max_length": 2048, "chat_template": CHAT}
    if not transformers.__version__.startswith("4."):
        return Qwen2Tokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=special, **settings)
    with TemporaryDirectory() as folder:  # transformers 4 reads files
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps(vocabulary), encoding="utf-8")
        merges_file.write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
        return Qwen2Tokenizer(str(vocab_file), str(merges_file), additional_special_tokens=special, **settings)


def tiny_qwen3(layers: int = 3, causal: bool = False):
    """A Qwen3 model and its tokenizer; `causal` with the head for the next token."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    tokenizer = tiny_qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (Qwen3ForCausalLM if causal else Qwen3Model)(config), tokenizer


def tiny_qwen_vl():
    """A Qwen2.5-VL model, which also reads pictures, and its tokenizer."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = tiny_qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    return Qwen2_5_VLForConditionalGeneration(config), tokenizer


def tiny_mistral(layers: int = 30):
    """A Mistral 3 model, which also reads pictures, and its processor."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PixtralImageProcessor, PixtralProcessor

    tokenizer = tiny_qwen_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    processor = PixtralProcessor(PixtralImageProcessor(), tokenizer, patch_size=4, chat_template=IN_PARTS)
    text = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 16,
        "patch_size": 4,
    }
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=tokenizer.vocab_size - 1)
    return Mistral3ForConditionalGeneration(config), processor


def tiny_qwen3_vl(layers: int = 3, parts: bool = False, causal: bool = False):
    """A Qwen3-VL model, which also reads pictures, and its tokenizer; `parts` where messages are lists of parts,
    `causal` with the head for the next token."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel

    tokenizer = tiny_qwen_tokenizer()
    if parts:
        tokenizer.chat_template = IN_PARTS
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    kind = Qwen3VLForConditionalGeneration if causal else Qwen3VLModel
    return kind(Qwen3VLConfig(text_config=text, vision_config=vision)), tokenizer


def tiny_qwen3_vl_processor():
    """A Qwen3-VL model with the head for the next token, and its processor for text and pictures."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    model, tokenizer = tiny_qwen3_vl(causal=True)
    tokenizer.add_special_tokens({"extra_special_tokens": list(PICTURE_MARKS)})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    processor = Qwen3VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen3VLVideoProcessor(), chat_template=IN_PARTS)
    return model, processor
