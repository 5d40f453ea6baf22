"""The `Host` that a Trainer is under FSDP2, whose model is another object after each cut."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..swap import Sharding, enable_checkpointing, is_sharded
from .engines import EngineTrainerHost
from .hosting import TrainerHost
from .schedules import follow_groups


__all__ = ["ShardedTrainerHost", "host_of"]


def host_of(trainer: Any) -> TrainerHost:
    """The host that suits the way in which the trainer's processes hold the model."""
    if trainer.is_deepspeed_enabled:
        return EngineTrainerHost(trainer)
    return ShardedTrainerHost(trainer) if trainer.is_fsdp_enabled else TrainerHost(trainer)


class ShardedTrainerHost(TrainerHost):
    """A `Host` over a trainer whose Accelerator shards.

    Attributes:
        sharding: how.
    """

    def __init__(self, trainer: Any):
        super().__init__(trainer)
        self.sharding = Sharding(trainer.accelerator, getattr(trainer.args, "shard_teacher", True))
        self.sharding.remember(trainer.model)  # an evaluation before the training shards it as well

    @property
    def whole_checkpoints(self) -> bool:
        """Whether a checkpoint holds whole tensors (FULL_STATE_DICT)."""
        return "FULL" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def hand_over(self, checkpoint: str | None) -> None:
        trainer = self.trainer
        if is_sharded(trainer.model):
            return
        if checkpoint is not None:
            trainer._load_from_checkpoint(checkpoint)
            trainer._taken_up = checkpoint
        self.sharding.remember(trainer.model)

    def install(self, replacement: nn.Module, prepare: bool = True) -> None:
        trainer = self.trainer
        if not is_sharded(trainer.model):  # a resumed run, before its model is prepared
            super().install(replacement, prepare=False)
            return

        def ready(model: nn.Module) -> None:
            trainer.model = model
            enable_checkpointing(model, trainer.args)
            self._add_noise()

        fresh = None if trainer.optimizer_was_given else self._fresh_groups
        live = self.sharding.install(trainer.model, replacement, trainer.optimizer, fresh, ready)
        follow_groups(trainer.lr_scheduler)
        trainer.model = trainer.model_wrapped = trainer.callback_handler.model = live
