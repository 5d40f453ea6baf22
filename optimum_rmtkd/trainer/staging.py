"""The life of a run: when to cut, whether a stage stands, who teaches. It drives the trainer through a few named
methods."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..distillation import EMATeacher, FrozenTeacher, Teacher, compose, fingerprint
from ..distillation.teachers import clean_copy
from ..hub.run import write_spectra
from . import checkpoint
from .data import isolated_rng
from .fitting import fitted_state, make_ready
from .parts import described
from .stages import (
    PlannedCut,
    Stage,
    check_target,
    metric_dropped,
    metric_reached,
    narrowest,
    plan_cuts,
    write_journal,
)
from .swap import DropoutSwitch, install, load_skeleton, skeleton


if TYPE_CHECKING:
    from .trainer import RMTKDTrainer


__all__ = ["Staging"]

logger = logging.getLogger(__name__)

OVERSHOOT = 0.01  # of the parameters, that a cut may go beyond the target


class Staging:
    """State of the stages of one run.

    Attributes:
        plan: all cuts, done ones included; None before training begins.
        stages: one record per cut that was tried.
        initial: the uncut model, teacher "initial" and template of every architecture read from a checkpoint.
        before: the model before the open stage, kept where it may be needed again (teacher "previous", roll-back).
        projections, projections_before: teacher's stream -> student's, now and in `before`.
        baseline: validation metric of the uncut model.
        stopped: why no further cut will follow.
    """

    def __init__(self, trainer: RMTKDTrainer):
        self.trainer, self.config = trainer, trainer.rmtkd_config
        self.given_teacher: Teacher | None = None
        self.given_description: str | None = None
        self.taught_by_itself = False  # the given teacher started from the very model that is cut
        self.dropout = DropoutSwitch()
        self.reset()

    def reset(self) -> None:
        """Forget the run (a new trial from `model_init`)."""
        self.plan: tuple[PlannedCut, ...] | None = None
        self.stages: list[Stage] = []
        self.initial: nn.Module | None = None
        self.initial_fingerprint = ""
        self.before: nn.Module | None = None
        self.projections: dict[str, torch.Tensor] = {}
        self.projections_before: dict[str, torch.Tensor] = {}
        self.teacher: Teacher | None = None
        self.baseline: float | None = None
        self.stopped: str | None = None
        self.retry_at: int | None = None
        self._restored: dict[str, torch.Tensor] | None = None  # tensors of a checkpoint not yet taken up

    # -- sizes --------------------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> int:
        """Parameters of the model now, tied ones once."""
        return self.trainer.cores.parameters()

    @property
    def reference_parameters(self) -> int:
        """Parameters before the first cut, of this run or of an earlier one: reductions count from them."""
        from .. import surgery

        return surgery.uncut_parameters(self.initial)

    @property
    def uses_previous(self) -> bool:
        """Whether the model before each cut has to be kept."""
        return self.config.max_metric_drop is not None or (
            self.given_teacher is None and self.config.teacher == "previous"
        )

    # -- moments of the run -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Training begins or goes on: plan, the cuts that are due, teacher and objectives."""
        self.remember_initial()
        if self.plan is None:
            self.plan = self._make_plan()
        if self._restored is not None:
            self._appoint_teacher()
        self._disable_dropout()
        self.advance(self.trainer.state.global_step)
        self.trainer.cores.begin()
        if self.teacher is None:
            self._appoint_teacher()

    def remember_initial(self) -> None:
        """Keep a copy of the model as the user passed it in."""
        if self.initial is None:
            self.initial = clean_copy(self.trainer.model)
            self.initial_fingerprint = fingerprint(self.initial)

    def advance(self, step: int) -> None:
        """Make the cuts that are due after `step` optimizer steps. Gradients must have been cleared."""
        cut = self._next_cut()
        if cut is None or step < max(cut.step, self.retry_at or 0):
            return
        value = self.trainer.measure()
        if self.baseline is None:
            self.baseline = value
        if self._must_wait(value):
            if not self.waits:
                self.trainer.patience.renew()
            self.retry_at = step + self._interval
            return
        self.retry_at = None
        if self._close_stage(value) and not self._target_met():
            self._cut(cut, step, value)

    def end(self) -> None:
        """Training is over: the last stage is judged, dropout comes back."""
        if self.stages and self.stages[-1].status == "open":
            self._close_stage(self.trainer.measure())
        if self.cuts_to_come and self.stages:
            cut = self._next_cut()
            logger.warning(
                "%d of %d planned cuts were not made (the next one was due at step %d%s).",
                len(self.plan) - cut.index,
                len(self.plan),
                cut.step,
                ", and the validation metric stayed below stage_threshold" if self.retry_at else "",
            )
        self._warn_short_of_target()
        self.dropout.restore()
        self._write_journal()

    # -- rules --------------------------------------------------------------------------------------------------------

    def _make_plan(self) -> tuple[PlannedCut, ...]:
        from .. import surgery

        check_target(self.config, self.parameters, self.reference_parameters)
        groups = surgery.stage_sites(self.trainer.model, self.config) if self.config.schedule == "layerwise" else ()
        kept = self.parameters / self.reference_parameters
        return plan_cuts(self.config, self.trainer.state.max_steps, groups, kept)

    def _next_cut(self) -> PlannedCut | None:
        done = len(self.stages)
        return self.plan[done] if self.stopped is None and done < len(self.plan) else None

    @property
    def cuts_to_come(self) -> bool:
        """Whether a planned cut is not made yet, and will be."""
        return self._next_cut() is not None and not self._meets_target()

    @property
    def waits(self) -> bool:
        """Whether a cut is due and waits for the metric."""
        return self.retry_at is not None

    @property
    def _interval(self) -> int:
        """Steps between two looks at a metric that has not reached `stage_threshold` yet."""
        given, state = self.trainer.args.eval_strategy, self.trainer.state
        by_steps = str(getattr(given, "value", given)) == "steps"
        return state.eval_steps if by_steps and state.eval_steps else max(1, state.max_steps // 20)

    def _meets_target(self) -> bool:
        target = self.config.target_reduction
        met = target is not None and self.parameters <= (1 - target) * self.reference_parameters
        return met and bool(self.stages)

    def _target_met(self) -> bool:
        if not self._meets_target():
            return False
        self.stopped = "target met"
        return True

    def _must_wait(self, value: float | None) -> bool:
        share = self.config.stage_threshold
        if share is None or value is None or not self.stages:
            return False
        return not metric_reached(value, self.baseline, share, self.trainer.greater_is_better)

    def _close_stage(self, value: float | None) -> bool:
        """Judge the open stage by its metric; False if it was rolled back."""
        if not self.stages or self.stages[-1].status != "open":
            return True
        allowed, stage = self.config.max_metric_drop, self.stages[-1]
        if allowed is None or value is None or self.baseline is None:
            self.stages[-1] = dataclasses.replace(stage, status="accepted", metric_after=value)
        elif metric_dropped(value, self.baseline, allowed, self.trainer.greater_is_better):
            reason = f"{stage.metric_name} {value:.4f}, uncut {self.baseline:.4f}, max_metric_drop {allowed:g}"
            self.stages[-1] = dataclasses.replace(stage, status="rolled_back", metric_after=value, reason=reason)
            self._roll_back(reason)
            return False
        else:
            self.stages[-1] = dataclasses.replace(stage, status="accepted", metric_after=value)
        self._write_journal()
        return True

    def _warn_short_of_target(self) -> None:
        target, reached = self.config.target_reduction, 1 - self.parameters / self.reference_parameters
        if target is not None and reached < target - 0.01:
            why = self.stopped or ("cuts are missing" if self.cuts_to_come else "all planned stages are done")
            logger.warning(
                "The model is reduced by %.1f %%, target_reduction asks for %.1f %% (%s).",
                100 * reached,
                100 * target,
                why,
            )

    # -- the cut ------------------------------------------------------------------------------------------------------

    def _cut(self, cut: PlannedCut, step: int, value: float | None) -> None:
        self.dropout.restore()  # the reduced model must inherit the real rates
        before = self.trainer.cores.plain_copy() if self.uses_previous else None
        reduction = self._reduce(cut)
        stage = Stage(
            index=cut.index,
            step=step,
            sites=tuple(site.to_dict() for site in reduction.sites),
            parameters_before=reduction.parameters_before,
            parameters_after=reduction.parameters_after,
            target_reduction=cut.target_reduction,
            metric_name=self.trainer.metric_name if value is not None else None,
            metric_before=value,
        )
        hardest = narrowest(stage.sites)
        if hardest and hardest[1] < self.config.min_rank_ratio:
            least = self.config.min_rank_ratio
            reason = f"{hardest[0]} would keep {hardest[1]:.3f} of its width, min_rank_ratio is {least:g}"
            logger.warning("Stage %d is not cut: %s.", cut.index, reason)
            self.stages.append(dataclasses.replace(stage, status="rejected", reason=reason))
            self.stopped = reason
            self._disable_dropout()
            self._write_journal()
            return
        self._apply(reduction, before)
        self.stages.append(dataclasses.replace(stage, metric_cut=self.trainer.measure()))
        self._disable_dropout()
        self._keep_spectra(reduction.report)
        self._write_journal()
        self.trainer.log_stage(self.stages[-1])

    def _reduce(self, cut: PlannedCut):
        from .. import surgery

        config, plain = self.config, self.trainer.cores.plain()
        if config.schedule == "layerwise":
            config = config.replace(target_reduction=None, target_flops=None)
        elif cut.target_flops is not None:
            config = config.replace(target_flops=cut.target_flops)

        def reduce(target: float | None):
            with isolated_rng(config.seed):
                return surgery.reduce(
                    plain,
                    self.trainer.calibration_batches(),
                    config,
                    target_reduction=target,
                    sites=None if cut.sites is None else list(cut.sites),
                    accelerator=self.trainer.accelerator,
                    progress=not self.trainer.args.disable_tqdm,
                )

        found, target = reduce(cut.target_reduction), self.config.target_reduction
        if target is not None and found.parameters_after < (1 - target - OVERSHOOT) * self.reference_parameters:
            found = reduce(target)  # the edges of the last layer ask for more than the target needs
        return found

    def _apply(self, reduction: Any, before: nn.Module | None) -> None:
        install(self.trainer, self.trainer.cores.put_on(reduction.model))
        cut = {name: matrix.detach().float() for name, matrix in reduction.projections.items()}
        self.before, self.projections_before = before, self.projections
        teacher = self.config.teacher
        if teacher == "initial" or self.given_teacher is not None:
            self.projections = compose(self.projections, cut)
        else:
            self.projections = cut if teacher == "previous" else {}
        self._after_change()

    def _roll_back(self, reason: str) -> None:
        """The model before the stage comes back; it is the last one, so no cut follows."""
        logger.warning("Stage %d is rolled back: %s.", self.stages[-1].index, reason)
        self.dropout.restore()
        install(self.trainer, self.trainer.cores.put_on(clean_copy(self.before)))
        # The teacher before `before` is gone: from here on "previous" teaches the model what it was itself.
        previous = self.config.teacher == "previous" and self.given_teacher is None
        self.projections = {} if previous else self.projections_before
        self.stopped = reason
        self._after_change()
        self._disable_dropout()
        self.trainer.log_stage(self.stages[-1])
        self._write_journal()

    def _after_change(self) -> None:
        # A metric of the larger network must not win `load_best_model_at_end`.
        state = self.trainer.state
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        self.trainer.patience.renew()
        self._appoint_teacher()

    def _disable_dropout(self) -> None:
        if self.config.disable_dropout and any(stage.accepted for stage in self.stages):
            self.dropout.disable(self.trainer.model)

    # -- teacher and objectives ---------------------------------------------------------------------------------------

    def _appoint_teacher(self) -> None:
        kind = self.config.teacher
        if self.given_teacher is not None:
            self.teacher = self.given_teacher
        elif kind == "ema":
            self.teacher = EMATeacher(self.trainer.cores.plain_copy(), self.config.ema_decay)
            if average := checkpoint.subset("ema", self._restored or {}):
                checkpoint.load_into(self.teacher.model, average)
        elif kind == "previous" and self.before is not None:
            self.teacher = FrozenTeacher(self.before)
        else:
            self.teacher = FrozenTeacher(self.initial)
        # No projection leads from the stream of another model to the stream of this one.
        projections = self.projections if self.given_teacher is None or self.taught_by_itself else {}
        restored, self._restored = self._restored, None
        make_ready(self.trainer, projections, restored)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the state of the run into a checkpoint folder (main process)."""
        keep = self.before is not None and (self.config.teacher == "previous" or self.stages[-1].status == "open")
        same = keep and fingerprint(self.before) == self.initial_fingerprint
        values = {
            "fingerprint": self.initial_fingerprint,
            "recipe": self.config.to_dict(),
            "parts": self._described(),
            "plan": [dataclasses.asdict(cut) for cut in self.plan],
            "stages": [stage.to_dict() for stage in self.stages],
            "baseline": self.baseline,
            "stopped": self.stopped,
            "retry_at": self.retry_at,
            "before": "initial" if same else self.before.config.to_dict() if keep else None,
        }
        tensors = checkpoint.flatten("projection", self.projections)
        tensors |= checkpoint.flatten("projection_before", self.projections_before)
        if keep and not same:
            tensors |= checkpoint.flatten("before", self.before.state_dict())
        if isinstance(self.teacher, EMATeacher):
            tensors |= checkpoint.flatten("ema", self.teacher.model.state_dict())
        tensors |= fitted_state(self.trainer) | checkpoint.flatten("core", self.trainer.cores.state())
        checkpoint.write_state(folder, values, tensors)

    def _described(self) -> dict[str, list[str]]:
        """What a resumed run must have in common with this one."""
        trainer = self.trainer
        weights = [trainer.reparameterization] if trainer.reparameterization is not None else []
        parts = described(objectives=trainer.objectives, reparameterization=weights, transforms=trainer.transforms)
        return parts | {"teacher": [] if self.given_description is None else [self.given_description]}

    def restore(self, folder: str | Path) -> None:
        """Take up the run whose checkpoint lies in `folder`; the model gets its architecture, not yet its weights.

        Raises:
            RMTKDError: no state of such a run, or another model or other parts than the run started with.
        """
        values, tensors = checkpoint.read_state(folder)
        self.remember_initial()
        checkpoint.same_weights_or_raise(values["fingerprint"], self.initial_fingerprint, folder)
        checkpoint.same_recipe_or_raise(values["recipe"], self.config.to_dict(), folder)
        checkpoint.same_parts_or_raise(values["parts"], self._described(), folder)
        self.plan = tuple(
            PlannedCut(**cut | {"sites": None if cut["sites"] is None else tuple(cut["sites"])})
            for cut in values["plan"]
        )
        self.stages = [Stage.from_dict(stage) for stage in values["stages"]]
        self.baseline, self.stopped, self.retry_at = values["baseline"], values["stopped"], values["retry_at"]
        device = self.trainer.args.device
        self.projections = {k: v.to(device) for k, v in checkpoint.subset("projection", tensors).items()}
        self.projections_before = {k: v.to(device) for k, v in checkpoint.subset("projection_before", tensors).items()}
        if values["before"] == "initial":
            self.before = self.initial
        elif values["before"] is not None:
            self.before = skeleton(self.initial, values["before"])
            checkpoint.load_into(self.before, checkpoint.subset("before", tensors))
        args = self.trainer.args
        own = checkpoint.read_process_state(folder, args.process_index, args.world_size)
        self.teacher, self._restored = None, tensors | own
        self.adopt(folder, prepare=False)

    def restore_cores(self) -> None:
        """After the plain weights of that checkpoint were loaded."""
        if self._restored is not None:
            self.trainer.cores.restore(checkpoint.subset("core", self._restored))

    def adopt(self, folder: str | Path, prepare: bool = True) -> None:
        """Give the model the architecture saved in `folder`, untrained, if it has another one."""
        fresh = load_skeleton(self.trainer.model, self.initial, folder)
        if fresh is not None:
            install(self.trainer, fresh, prepare)

    def _write_journal(self) -> None:
        if self.trainer.args.should_save and self.initial is not None:
            folder = self.trainer.args.output_dir
            write_journal(folder, self.stages, self.config, self.reference_parameters, self.parameters)

    def _keep_spectra(self, report: Any) -> None:
        self.trainer.reports.append(report)
        if self.trainer.args.should_save:
            write_spectra(self.trainer.args.output_dir, self.stages[-1].index, report)
