"""Where a pipeline's files are when they are not in a folder of the user's: the hub and its local cache."""

from __future__ import annotations

import re
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError

from sedimo.errors import InputError

ZOO_PREFIX = "zoo:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a hub id, `owner/name`."""
    return _HUB_ID.fullmatch(text) is not None


def hub_folder(hub_id: str, variant: str | None) -> Path:
    """The folder in the local cache of a pipeline of the hub, downloaded if needed: safetensors only, no code.

    Raises:
        InputError: no such pipeline there, or it is not cached and the hub cannot be reached.
    """
    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True, variant=variant))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{hub_id!r} is no folder here and could not be had from the hub: {reason}. Check the name and the "
            "network (a private one needs `hf auth login`), or download it and give the folder"
        ) from error
