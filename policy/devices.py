"""Whether this machine has a device that a recipe names. Imports torch only to look."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.errors import UserError

if TYPE_CHECKING:
    import torch


class DeviceError(UserError):
    """A device that is not there."""


def check_device(name: str, where: str) -> None:
    """Raises DeviceError where tensors cannot be made on a device.

    Args:
        where: the recipe's key, for the message.
    """
    import torch

    try:
        device = _device(name)
        if device.type == "meta":
            raise RuntimeError("it holds shapes without numbers")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise DeviceError(
            f"{where}: '{name}' cannot be used here ({_first_sentence(error)}); there is {', '.join(_there())}"
        ) from None


def _device(name: str) -> torch.device:
    import torch

    try:
        return torch.device(name)
    except RuntimeError:
        raise RuntimeError("torch knows no such device") from None


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0][:160] or type(error).__name__


def _there() -> list[str]:
    import torch

    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found
