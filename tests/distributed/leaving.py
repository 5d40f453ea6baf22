"""The end of a launched script."""

from __future__ import annotations

from accelerate import PartialState


def leave(trainer):
    """Together, or the first process to go takes down the connections of the others."""
    trainer.accelerator.wait_for_everyone()
    PartialState().destroy_process_group()
