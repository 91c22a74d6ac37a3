"""What to say where memory does not suffice: the computer's, or a GPU's."""

from __future__ import annotations


def no_memory(error: BaseException) -> str | None:
    """What to change where memory does not suffice; None of another error."""
    reason = " ".join(str(error).split()).split(" Of the allocated memory")[0]
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in reason:
        where = reason.partition("DefaultCPUAllocator: ")[2] or reason or "an allocation failed"
        return (
            f"the computer has too little memory ({where.rstrip('.')}); lower training.batch_size, bank.batch_size or "
            "data.resolution, or end what else uses it."
        )
    if type(error).__name__ != "OutOfMemoryError" and "MPS backend out of memory" not in reason:
        return None  # torch's own, which is not imported here; that of Apple's GPUs has no class of its own
    return (
        f"the GPU has too little memory ({reason.rstrip('.')}); say --training.gradient_checkpointing true, "
        "--model.offload true or, for a LoRA of a transformer, --model.quantization nf4, lower training.batch_size, "
        "bank.batch_size or data.resolution, or end what else uses the GPU."
    )
