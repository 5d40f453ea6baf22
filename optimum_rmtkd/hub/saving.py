"""`save_pretrained` of our models: what transformers does, whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..disks import full_disk_named
from ..folders import writing_into


if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["save_pretrained", "saving_into"]

UPLOAD = ("repo_id", "commit_message", "private", "create_pr")  # options of an upload alone
SHARED = ("token", "max_shard_size")  # and of both


@contextlib.contextmanager
def saving_into(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder for the files of a model. If the block succeeds they take their places in `folder`; else
    that is as it was before: never a config without weights, nor new weights under an old config.

    Raises:
        DiskFullError: the disk has no room for the model.
    """
    with full_disk_named(folder, f"The model in {folder}"), writing_into(folder) as beside:
        yield beside


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    push_to_hub: bool = False,
    *args: Any,
    **kwargs: Any,
) -> None:
    """As `PreTrainedModel.save_pretrained`, into a folder beside that takes its place: see `saving_into`. An upload
    comes when the model is in its place. In place are written the shards of several processes
    (`distributed_checkpoint`), each of which has to find the folder, and what is uploaded of a `state_dict` of the
    caller's own.

    Raises:
        DiskFullError: the disk has no room for the model.
    """
    from transformers import PreTrainedModel

    given = (is_main_process, state_dict)
    of_several = kwargs.get("distributed_checkpoint") and _several_processes()
    in_place = not is_main_process or of_several or push_to_hub and state_dict is not None
    if in_place or os.path.isfile(save_directory):
        PreTrainedModel.save_pretrained(model, save_directory, *given, push_to_hub, *args, **kwargs)
        return
    upload = {name: kwargs.pop(name) for name in UPLOAD if name in kwargs} if push_to_hub else {}
    with saving_into(save_directory) as beside:
        PreTrainedModel.save_pretrained(model, beside, *given, False, *args, **kwargs)
    if push_to_hub:
        shared = {name: kwargs[name] for name in SHARED if name in kwargs}
        model.push_to_hub(**{"repo_id": Path(save_directory).absolute().name, **upload, **shared})


def _several_processes() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
