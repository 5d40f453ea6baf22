"""Hooks of the checkpoints: they appear whole or not at all; the architecture has to be in place before weights are
loaded, and what only we know has to lie beside the optimizer's state (hence not with save_only_model)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, sort_checkpoints

from ...checkpoints import LAST, check_whole, checkpoints_in, discard, newest_whole, tell_passed, tidy
from ...disks import full_disk_named
from ...distillation.teachers import clean_copy
from ...errors import IncompleteCheckpointError
from ...folders import writing_into
from ...reparameterization import fold, is_reparameterized
from ...surgery.processes import from_main, one_for_all, several
from ..checkpoint import read_process_state, read_state, write_process_state, write_state
from ..engine_checks import check_written_by, partitions_in
from ..failures import NoticeBoard
from ..parts import transforms_state
from ..swap import (
    complete_state,
    foreign_optimizer,
    in_engine,
    is_sharded,
    load_optimizer,
    load_skeleton,
    load_weights,
    whole,
    whole_copy,
)
from ..writing import bytes_of, newest_everywhere, written_whole


__all__ = ["CheckpointHooks"]

logger = logging.getLogger(__name__)


class CheckpointHooks:
    """In front of a trainer: its checkpoints hold the run, and plain weights of whatever width.

    Attributes:
        sealed: called on the folder of each new checkpoint, by the process that then gives it its name.
    """

    sealed: Callable[[Path], None] | None = None
    _board: NoticeBoard | None = None  # of the training at hand
    _pending: Path | None = None  # folder in which a checkpoint is being written
    _unpushed: str | None = None  # the checkpoint that is to be pushed once it has its name
    _saved_at: int | None = None  # step of the last checkpoint

    # -- written whole ------------------------------------------------------------------------------------------------
    # transformers writes checkpoint-N in place, into the folder that `_get_output_dir` names, records the best one
    # there, pushes it, and prunes older ones. Meanwhile that folder is another one; what reads the name comes after.

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._pending is None else str(self._pending)

    def _save_checkpoint(self, model, trial):
        args, state, step = self.args, self.state, self.state.global_step
        run_dir = self._get_output_dir(trial)
        target = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        best, self._unpushed = state.best_global_step, None
        wanted = bytes_of(self.model, None if args.save_only_model else self.optimizer)
        board = self._board or NoticeBoard(self.accelerator)
        with written_whole(target, self.accelerator, board, step, wanted, self.sealed) as folder:
            self._pending, state.best_global_step = folder.parent, None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._pending, state.best_global_step = None, best
            self._record_best(Path(run_dir), target)
            if args.should_save:
                state.save_to_json(str(folder / LAST))
        self._saved_at = step
        if self._unpushed is not None:
            self._push_from_checkpoint(str(target))
        if args.should_save and (args.save_total_limit or 0) > 0:
            self._prune(run_dir, target)

    def _prune(self, run_dir: str, newest: Path) -> None:
        """All but the last `save_total_limit`, as transformers does; the newest and the best one stay."""
        kept = {str(newest), str(self.state.best_model_checkpoint)}
        found = sort_checkpoints(run_dir, use_mtime=True)
        superfluous = len(found) - max(self.args.save_total_limit, len(kept.intersection(found)))
        for path in [path for path in found if path not in kept][: max(0, superfluous)]:
            discard(Path(path))

    def _record_best(self, run_dir: Path, target: Path) -> None:
        """As transformers does, of the checkpoint at hand or one that is there."""
        if not self.state.best_global_step:
            return
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == target or best.exists():
            self.state.best_model_checkpoint = str(best)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._pending is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._unpushed = checkpoint_folder

    def _save_before_leaving(self) -> None:
        """The checkpoint of this step, unless it was due and is written, or none are wanted."""
        if self.args.save_strategy != SaveStrategy.NO and self._saved_at != self.state.global_step:
            self._save_checkpoint(self.model, self._trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _what_is_kept(self) -> str:
        """Told to whoever ended the training."""
        folder = self.args.output_dir
        found = newest_whole(folder)
        if found.newest is None:
            return f"{folder} holds no checkpoint to continue from."
        return f"{found.newest} is whole: train(resume_from_checkpoint=True) continues from it."

    # -- continued from -----------------------------------------------------------------------------------------------

    def _tidy(self) -> None:
        """Remove what runs that were killed left among the checkpoints."""
        with one_for_all(self.accelerator):
            if self.is_local_process_zero():
                tidy(self.args.output_dir)

    def _checkpoint_to_resume(self, asked: str | bool | None) -> str | bool | None:
        """A whole checkpoint: the newest one for True.

        Raises:
            IncompleteCheckpointError: the one that is named is not whole, or none is.
        """
        asked = from_main(asked, self.accelerator)
        if asked is True:
            asked = self._newest() or True  # without any, the trainer says so
        if asked and asked is not True:
            found = self._partitions_anywhere(asked)
            with one_for_all(self.accelerator):
                check_whole(asked)
                plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
                check_written_by(asked, plugin and plugin.zero_stage, self.args.world_size, found)
        return asked

    def _partitions_anywhere(self, folder: str) -> set[int]:
        """Where machines share no disk, each has its own. Collective."""
        found = partitions_in(folder)
        if not several(self.accelerator):
            return found
        from accelerate.utils import gather_object

        return set().union(*gather_object([found]))

    def _newest(self) -> str | None:
        folder = self.args.output_dir
        found = newest_everywhere(checkpoints_in(folder)[::-1], self.accelerator)
        if self.is_world_process_zero():
            tell_passed(found)
        if found.newest is None and found.passed:
            path, fault = found.passed[0]
            raise IncompleteCheckpointError(
                f"resume_from_checkpoint=True: no checkpoint in {folder} can be continued from; {path.name}: {fault}. "
                "Move it away and train without resume_from_checkpoint."
            )
        return None if found.newest is None else str(found.newest)

    _taken_up = None  # a checkpoint that was loaded before the model was sharded

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._taken_up == resume_from_checkpoint:
            self._taken_up = None
            return
        values, tensors = read_state(resume_from_checkpoint)
        own = read_process_state(resume_from_checkpoint, self.args.process_index, self.args.world_size)
        self._host.run.load_state_dict({"values": values, "tensors": tensors | own}, str(resume_from_checkpoint))
        self._calls_head = values.get("calls_head")
        self._load_weights(resume_from_checkpoint)
        self._host.run.restore_cores()

    def _save_optimizer_and_scheduler(self, output_dir):
        if is_sharded(self.model):
            complete_state(self.optimizer)  # torch's writer would make a step to complete it
        super()._save_optimizer_and_scheduler(output_dir)
        own = transforms_state(self._host.run.parts.transforms)
        write_process_state(output_dir, self.args.process_index, self.args.world_size, own)
        state = self._host.run.state_dict()  # of every process: some of it may lie in shards
        if self.args.should_save:
            # seen in the first step, which a run that goes on does not make again
            write_state(output_dir, state["values"] | {"calls_head": self._calls_head}, state["tensors"])

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not foreign_optimizer(checkpoint, is_sharded(self.model)):
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self.model, self.optimizer, checkpoint)
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    def save_model(self, output_dir=None, _internal_call=False):
        """As the trainer's own. Under FSDP2 a whole model, also with SHARDED_STATE_DICT, which is for checkpoints:
        transformers would write none; under DeepSpeed in fp32, whatever is computed in. Collective there."""
        if self.is_deepspeed_enabled:
            return self._save_from_engine(output_dir, _internal_call)
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

    def _save_from_engine(self, output_dir, internal: bool) -> None:
        trained = self.model
        self.model = whole(trained)
        try:
            self._save(output_dir)
        finally:
            self.model = trained
        if self.args.push_to_hub and not internal:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir=None, state_dict=None):
        """Plain weights of the real class, whatever they are trained as: every checkpoint loads with stock
        `from_pretrained`. A disk that is full leaves what was there as it was."""
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self._pending is not None:
            return self._save_plain(folder, state_dict)
        with full_disk_named(folder, f"The model in {folder}"), writing_into(folder) as beside:
            return self._save_plain(beside, state_dict)

    def _save_plain(self, folder: Path, state_dict) -> None:
        trained = self.model
        if is_sharded(trained):
            self.model = self._host.sharding.blueprint.filled(state_dict)
        elif is_reparameterized(trained):
            self.model = fold(clean_copy(trained), self._parts.reparameterization)
        else:
            return super()._save(str(folder), state_dict)
        try:
            super()._save(str(folder))
        finally:
            self.model = trained

    def _load_best_model(self):
        self._fold()
        host, best = self._host, self.state.best_model_checkpoint
        fresh = load_skeleton(host.model, self._host.run.initial, best)
        logger.info("Loading the best model from %s (%s).", best, self.state.best_metric)
        if in_engine(host.model):
            fresh = whole_copy(host.model) if fresh is None else fresh
            load_weights(fresh, best)
            host.install(fresh)
            return
        if fresh is not None:
            host.install(fresh)
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
        fold(self.model, self._parts.reparameterization)
        if self.model_wrapped is not self.model:
            accelerator, wrapped = self.accelerator, self.model_wrapped
            accelerator._models = [m for m in accelerator._models if m is not wrapped and m is not self.model]
            self.model.__dict__.pop("_is_accelerate_prepared", None)
            self.model_wrapped = self.model
