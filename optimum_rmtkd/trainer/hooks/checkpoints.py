"""Hooks of the checkpoints: the architecture has to be in place before weights are loaded, and what only we know has
to lie beside the optimizer's state (hence not with save_only_model)."""

from __future__ import annotations

import logging

from ...distillation.teachers import clean_copy
from ...reparameterization import fold, is_reparameterized
from ..checkpoint import read_process_state, read_state, write_process_state, write_state
from ..parts import transforms_state
from ..swap import load_skeleton, load_weights


__all__ = ["CheckpointHooks"]

logger = logging.getLogger(__name__)


class CheckpointHooks:
    """In front of a trainer: its checkpoints hold the run, and plain weights of whatever width."""

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        values, tensors = read_state(resume_from_checkpoint)
        own = read_process_state(resume_from_checkpoint, self.args.process_index, self.args.world_size)
        self.run.load_state_dict({"values": values, "tensors": tensors | own}, str(resume_from_checkpoint))
        self._load_weights(resume_from_checkpoint)
        self.run.restore_cores()

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        own = transforms_state(self.run.parts.transforms)
        write_process_state(output_dir, self.args.process_index, self.args.world_size, own)
        if self.args.should_save:
            state = self.run.state_dict()
            write_state(output_dir, state["values"], state["tensors"])

    def _save(self, output_dir=None, state_dict=None):
        """Plain weights, whatever they are trained as: every checkpoint loads with stock `from_pretrained`."""
        if not self.args.should_save or not is_reparameterized(self.model):
            return super()._save(output_dir, state_dict)
        trained = self.model
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
