"""In which number formats weights may be trained."""

from __future__ import annotations

import torch


def half_precision(model: torch.nn.Module) -> str | None:
    """A sentence where parameters that are to be trained are 16-bit; None: they are not.

    A step of AdamW is about as large as the learning rate, and bfloat16 keeps 8 bits: where a weight is hundreds of
    times larger than the step, it is what it was.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            dtype = str(parameter.dtype).removeprefix("torch.")
            return (
                f"policy.dtype: '{name}' is to be trained in {dtype}, in which small steps are rounded away and "
                "nothing is learned; set policy.dtype: float32, or train adapters (policy.lora), which are float32"
            )
    return None
