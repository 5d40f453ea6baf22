"""Hooks of the checkpoints: the architecture has to be in place before weights are loaded, and what only we know has
to lie beside the optimizer's state (hence not with save_only_model)."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers.trainer import SCHEDULER_NAME

from ...distillation.teachers import clean_copy
from ...reparameterization import fold, is_reparameterized
from ..checkpoint import read_process_state, read_state, write_process_state, write_state
from ..parts import transforms_state
from ..swap import (
    complete_state,
    foreign_optimizer,
    is_sharded,
    load_optimizer,
    load_skeleton,
    load_weights,
)


__all__ = ["CheckpointHooks"]

logger = logging.getLogger(__name__)


class CheckpointHooks:
    """In front of a trainer: its checkpoints hold the run, and plain weights of whatever width."""

    _taken_up = None  # a checkpoint that was loaded before the model was sharded

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._taken_up == resume_from_checkpoint:
            self._taken_up = None
            return
        values, tensors = read_state(resume_from_checkpoint)
        own = read_process_state(resume_from_checkpoint, self.args.process_index, self.args.world_size)
        self.run.load_state_dict({"values": values, "tensors": tensors | own}, str(resume_from_checkpoint))
        self._load_weights(resume_from_checkpoint)
        self.run.restore_cores()

    def _save_optimizer_and_scheduler(self, output_dir):
        if is_sharded(self.model):
            complete_state(self.optimizer)  # torch's writer would make a step to complete it
        super()._save_optimizer_and_scheduler(output_dir)
        own = transforms_state(self.run.parts.transforms)
        write_process_state(output_dir, self.args.process_index, self.args.world_size, own)
        state = self.run.state_dict()  # of every process: some of it may lie in shards
        if self.args.should_save:
            write_state(output_dir, state["values"], state["tensors"])

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not foreign_optimizer(checkpoint, is_sharded(self.model)):
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self.model, self.optimizer, checkpoint)
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    def save_model(self, output_dir=None, _internal_call=False):
        """As the trainer's own. Under FSDP2 a whole model, also with SHARDED_STATE_DICT, which is for checkpoints:
        transformers would write none. Collective there."""
        if not is_sharded(self.model):
            return super().save_model(output_dir, _internal_call)
        plugin = self.accelerator.state.fsdp_plugin
        kind = plugin.state_dict_type
        if _internal_call and not self._host.whole_checkpoints:
            if self.args.should_save:
                self._host.sharding.blueprint.save_config(output_dir or self.args.output_dir)
            return None
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            return super().save_model(output_dir, _internal_call)
        finally:
            plugin.set_state_dict_type(kind)

    def _save(self, output_dir=None, state_dict=None):
        """Plain weights of the real class, whatever they are trained as: every checkpoint loads with stock
        `from_pretrained`."""
        trained = self.model
        if not self.args.should_save or not (is_reparameterized(trained) or is_sharded(trained)):
            return super()._save(output_dir, state_dict)
        if is_sharded(trained):
            self.model = self._host.sharding.blueprint.filled(state_dict)
        else:
            self.model = fold(clean_copy(trained), self.reparameterization)
        try:
            super()._save(output_dir)
        finally:
            self.model = trained

    def _load_best_model(self):
        self._fold()
        host, best = self._host, self.state.best_model_checkpoint
        fresh = load_skeleton(host.model, self.run.initial, best)
        if fresh is not None:
            host.install(fresh)
        logger.info("Loading the best model from %s (%s).", best, self.state.best_metric)
        self._load_weights(best)

    def _load_weights(self, folder) -> None:
        if self._host.inside.wraps:  # what lies around the narrowed model is known to its own loader
            super()._load_from_checkpoint(folder)
        else:
            load_weights(self._host.model, folder)

    def _fold(self) -> None:
        """Training is over: plain weights in the model itself. Its wrapper is dropped, it knows parameters that are
        gone."""
        if not is_reparameterized(self.model):
            return
        fold(self.model, self.reparameterization)
        if self.model_wrapped is not self.model:
            accelerator, wrapped = self.accelerator, self.model_wrapped
            accelerator._models = [m for m in accelerator._models if m is not wrapped and m is not self.model]
            self.model.__dict__.pop("_is_accelerate_prepared", None)
            self.model_wrapped = self.model
