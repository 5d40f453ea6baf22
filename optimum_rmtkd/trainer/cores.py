"""The run's reparameterization: on the model while it trains, off in everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..distillation.teachers import clean_copy
from ..reparameterization import core_parameters, fold, is_reparameterized, plain_parameters
from .swap import install


if TYPE_CHECKING:
    from .trainer import RMTKDTrainer


__all__ = ["Cores"]


class Cores:
    """Puts the reparameterization of a trainer on its models, and takes it off. Without one, every method is idle."""

    def __init__(self, trainer: RMTKDTrainer):
        self.trainer = trainer

    def parameters(self) -> int:
        """Parameters of the model as it would be saved, tied ones once."""
        from .. import surgery

        model = self.trainer.model
        cores = core_parameters(model)
        named = {name for name, _ in model.named_parameters()}
        plain = sum(t.numel() for name, t in plain_parameters(model).items() if name not in named) if cores else 0
        return surgery.count_parameters(model) - sum(p.numel() for p in cores.values()) + plain

    def plain_copy(self) -> nn.Module:
        """A copy of the model with plain weights, in evaluation mode."""
        return fold(clean_copy(self.trainer.model))

    def plain(self) -> nn.Module:
        """The model itself where its weights are plain, else a copy."""
        return self.plain_copy() if is_reparameterized(self.trainer.model) else self.trainer.model

    def put_on(self, model: nn.Module, tensors: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
        """`model` with the reparameterization on, in place."""
        if self.trainer.reparameterization is not None:
            self.trainer.reparameterization.apply(model, tensors)
        return model

    def begin(self) -> None:
        """Put it on a model that no cut has put it on."""
        if self.trainer.reparameterization is not None and not is_reparameterized(self.trainer.model):
            install(self.trainer, self.put_on(clean_copy(self.trainer.model)))

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that a checkpoint's plain weights were folded from."""
        how = self.trainer.reparameterization
        return {} if how is None else how.state(self.trainer.model)

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """After a checkpoint's plain weights were loaded, before its optimizer's state: the tensors of `state`."""
        if tensors:
            install(self.trainer, self.put_on(clean_copy(self.trainer.model), tensors), prepare=False)

    def fold(self) -> None:
        """Training is over: plain weights in the model itself. Its wrapper is dropped, it knows parameters that are
        gone."""
        trainer = self.trainer
        if not is_reparameterized(trainer.model):
            return
        fold(trainer.model, trainer.reparameterization)
        if trainer.model_wrapped is not trainer.model:
            accelerator, wrapped = trainer.accelerator, trainer.model_wrapped
            accelerator._models = [m for m in accelerator._models if m is not wrapped and m is not trainer.model]
            trainer.model.__dict__.pop("_is_accelerate_prepared", None)
            trainer.model_wrapped = trainer.model
