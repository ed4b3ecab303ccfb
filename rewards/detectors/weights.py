"""Where the frozen models of rewards find their weights: a local folder, or the hub cache; the network only if asked.

Detectors, CLIP encoders and preference models load through here, so that each says the same plain sentence when its
weights are not there, and none downloads gigabytes because a path was misspelt.
"""

from __future__ import annotations

from pathlib import Path

from policy.devices import check_device
from runtime.errors import UserError


class WeightsError(UserError):
    """Weights that are not where the recipe says."""


def folder_of(path: str, needed: str, download: bool = False, where: str = "path") -> Path:
    """The folder that holds `needed` (a file name such as config.json).

    Args:
        path: a local folder in the released layout, or a hub id such as facebook/mask2former-swin-small-coco-instance.
        download: fetch a hub id that the cache lacks.
        where: the recipe's key, for the error.

    Raises:
        WeightsError: neither is there.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / needed).is_file():
            raise WeightsError(f"{where}: {folder} has no {needed}; give a folder in the released layout")
        return folder
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise WeightsError(f"{where}: no folder {folder} (seen from {Path.cwd()})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(path, local_files_only=not download))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        hint = f"the hub said: {error}" if download else "set `download: true` to fetch it"
        raise WeightsError(f"{where}: '{path}' is neither a folder here nor a model in the hub cache; {hint}") from None
    if not (found / needed).is_file():
        raise WeightsError(f"{where}: '{path}' as cached in {found} has no {needed}; it was fetched in part")
    return found


def file_of(path: str, download: bool = False, where: str = "path") -> Path:
    """One file of weights: a local file, or organisation/repository/file in the hub cache.

    Raises:
        WeightsError: neither is there.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if file.is_absolute() or path.startswith((".", "~")) or path.count("/") < 2:
        raise WeightsError(f"{where}: no file {file} (seen from {Path.cwd()})")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    organisation, repository, name = path.split("/", 2)
    try:
        return Path(hf_hub_download(f"{organisation}/{repository}", name, local_files_only=not download))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        hint = f"the hub said: {error}" if download else "set `download: true` to fetch it"
        raise WeightsError(f"{where}: '{path}' is neither a file here nor one in the hub cache; {hint}") from None


def device_of(name: str, where: str = "device") -> str:
    """ "auto" is a CUDA device where there is one, else the CPU. Raises DeviceError for one that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name, where)
    return name
