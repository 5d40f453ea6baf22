"""The `Host` that a Trainer is under DeepSpeed, where each cut has another engine built around the same model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...errors import RMTKDError
from ..swap import Engine, enable_checkpointing, in_engine, made_whole
from .hosting import TrainerHost


__all__ = ["EngineTrainerHost"]


class EngineTrainerHost(TrainerHost):
    """A `Host` over a trainer whose Accelerator prepares models with DeepSpeed.

    Attributes:
        engine: how it holds them.

    Raises:
        RMTKDError: an optimizer or a scheduler was given.
    """

    def __init__(self, trainer: Any):
        super().__init__(trainer)
        if given := [name for name in ("optimizer", "lr_scheduler") if getattr(trainer, name) is not None]:
            raise RMTKDError(
                f"optimizers= holds an {given[0]}, which transformers does not use under DeepSpeed, and a cut makes a "
                "new one. Leave it out: optim and lr_scheduler_type with their arguments, or optimizer_cls_and_kwargs."
            )
        self.engine = Engine(trainer.accelerator)
        self.engine.remember(trainer.model)  # an evaluation before the training makes an engine as well

    def take_back(self) -> None:
        trainer = self.trainer
        if in_engine(trainer.model):
            self.engine.release(trainer.model)
            trainer.model_wrapped, trainer.deepspeed = trainer.model, None

    def hand_over(self, checkpoint: str | None) -> None:
        trainer = self.trainer
        made_whole(trainer.model)  # of a new trial
        if checkpoint is not None:
            trainer._load_from_checkpoint(checkpoint)
        self.run.remember_initial()  # in its own precision: the engine may keep it in another one
        self.engine.remember(trainer.model)

    def _read(self, batch: Mapping[str, Any], strip: bool) -> Mapping[str, Any]:
        """As ever: the trainer would round pixels to what the engine computes in, and whole models keep their own
        precision."""
        self.trainer.is_deepspeed_enabled = False
        try:
            return super()._read(batch, strip)
        finally:
            self.trainer.is_deepspeed_enabled = True

    def install(self, replacement: nn.Module, prepare: bool = True) -> None:
        trainer = self.trainer
        if not in_engine(trainer.model):  # a resumed run, before its model is prepared
            super().install(replacement, prepare=False)
            return

        def ready() -> None:
            enable_checkpointing(trainer.model, trainer.args)
            self._add_noise()

        live = self.engine.install(trainer.model, replacement, trainer.optimizer, self._fresh_optimizer, ready)
        trainer.model_wrapped = trainer.deepspeed = live

    def _fresh_optimizer(self) -> Any:
        trainer = self.trainer
        kept, trainer.optimizer = trainer.optimizer, None
        try:
            return trainer.create_optimizer()
        finally:
            trainer.optimizer = kept

    def forget_moments(self) -> None:
        """The weights were put back with a new optimizer."""
        self.patience.renew()
