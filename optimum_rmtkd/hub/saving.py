"""`save_pretrained` of a reduced model: what transformers does, whole or not at all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..disks import full_disk_named
from ..folders import writing_into


if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["save_pretrained"]


def save_pretrained(
    model: PreTrainedModel, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
) -> None:
    """As `PreTrainedModel.save_pretrained`. Where it fails, `save_directory` is as it was before: never a config
    without weights, nor new weights under an old config.

    Raises:
        DiskFullError: the disk has no room for the model.
    """
    from transformers import PreTrainedModel

    in_place = not is_main_process or kwargs.get("push_to_hub") or kwargs.get("distributed_checkpoint")
    if in_place or os.path.isfile(save_directory):
        PreTrainedModel.save_pretrained(model, save_directory, is_main_process, *args, **kwargs)
        return
    with full_disk_named(save_directory, f"The model in {save_directory}"), writing_into(save_directory) as beside:
        PreTrainedModel.save_pretrained(model, beside, is_main_process, *args, **kwargs)
