"""The life of one run: fine-tune, cut, distil, judge, and again. It drives a `Host` and does not know who that is.

fit      the model learns the task alone, where it cannot teach yet
cut      the layers become narrower
distil   the narrow model learns from its former self
judge    the stage stands, is repeated at a lower rate, is rolled back, or ends the cuts
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import nn

from ..config import RMTKDConfig
from ..distillation import TaskLoss, Teacher, fingerprint
from ..distillation.teachers import clean_copy
from ..errors import BudgetError, NoTargetError
from ..reparameterization import is_reparameterized
from . import checkpoint, plain
from .again import begin_again, stretch
from .agenda import Agenda
from .companions import Companions
from .cutting import planned, reduced
from .distilling import begin_stage, conclude, look, repeat, settle, stay, suit, wait, wait_or_stop
from .fit import Fit
from .host import Host
from .judge import Judge, Measured
from .keepsake import Keepsake
from .pace import Pace
from .parts import Parts, load_transforms
from .records import Records, stage_of
from .stages import PlannedCut, Stage, too_narrow
from .state import load_run_state, run_state
from .step import StepLoss
from .swap import DropoutSwitch, whole_copy
from .tutor import Tutor


__all__ = ["Run"]

logger = logging.getLogger(__name__)


class Run:
    """State of one run.

    Attributes:
        agenda, fit, judge, pace, keepsake, tutor, loss: what is due, the fine-tuning before the first cut, the
            verdicts, the learning rate, the model just after its cut, who teaches, and the loss of a step.
        initial: the uncut model, once it is fine-tuned: teacher "initial" and template of every architecture.
        fingerprint, layout: of the model that the user passed in: of its weights, and of their names, shapes and
            dtypes alone.
        reports: spectra of each cut.
        evaluates: whether there are evaluations while training.
    """

    def __init__(self, host: Host, config: RMTKDConfig, parts: Parts, companions: Companions, reentrant: bool = False):
        self.host, self.config, self.parts = host, config, parts
        self.tutor = Tutor(parts.objectives, companions, host.label_names, config)
        self.loss = StepLoss(self.tutor, parts.transforms, host, reentrant)
        self.judge, self.pace, self.fit = Judge(host, config), Pace(host, config), Fit(host, config)
        self.agenda, self.keepsake = Agenda(), Keepsake(host, parts.reparameterization)
        self.dropout, self.records = DropoutSwitch(), Records(host, config)
        self.evaluates = True
        self.reset()

    def follow(self, config: RMTKDConfig) -> None:
        """Another recipe, before the run begins: for all that read it."""
        for part in (self, self.judge, self.pace, self.fit, self.tutor, self.records):
            part.config = config

    def reset(self) -> None:
        """Forget the run (a new trial, with a new model)."""
        for part in (self.agenda, self.judge, self.pace, self.fit, self.tutor, self.keepsake):
            part.reset()
        self.reports: list[Any] = []
        self.initial: nn.Module | None = None
        self.fingerprint = self.layout = ""
        self.restored: dict[str, torch.Tensor] | None = None  # tensors of a checkpoint not yet taken up

    # -- what others read ---------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model under training."""
        return self.host.model

    @property
    def teacher(self) -> Teacher | None:
        """Who teaches now; None while the model is fine-tuned."""
        return self.tutor.teacher

    @property
    def stages(self) -> list[Stage]:
        """Records of the cuts that were tried."""
        return self.agenda.stages

    @property
    def plan(self) -> tuple[PlannedCut, ...] | None:
        """All cuts, done ones included; None before training begins."""
        return self.agenda.plan

    @property
    def active(self) -> bool:
        """Whether training has begun, and steps are to be made on our loss."""
        return self.fit.going or self.teacher is not None

    @property
    def progress(self) -> float:
        """Share of the steps of distillation that is done."""
        begun = self.fit.last_step
        return max(0, self.host.step - begun) / max(1, self.host.max_steps - begun)

    @property
    def parameters(self) -> int:
        """Parameters of the model now, tied ones once."""
        return plain.parameters(self.host.model)

    @property
    def reference_parameters(self) -> int:
        """Parameters before the first cut, of this run or of an earlier one: reductions count from them."""
        from .. import surgery

        return surgery.uncut_parameters(self.initial)

    @property
    def cuts_to_come(self) -> bool:
        """Whether a planned cut is not made yet, and will be. Until training begins, whether any is wanted."""
        if self.plan is None:
            return self.config.schedule != "none"
        return self.agenda.next_cut() is not None and not self._meets_target()

    # -- moments of the run -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Training begins or goes on: plan, the cuts that are due, teacher and objectives."""
        self.remember_initial()
        resumed = self.restored is not None
        self._plan()
        if resumed and not self.fit.going:
            self.appoint_teacher()
        elif resumed:
            load_transforms(self.parts.transforms, self.restored)
            self.restored = None
        self.disable_dropout()
        self.agenda.ended = False
        if not resumed:
            self.host.reschedule()
        elif self.stages:
            self.write_journal()  # it may go on in another folder
        self._measure_cut()
        if self.host.step < self.host.max_steps:
            self._advance(self.host.step)
        self._begin_distilling()

    def _plan(self) -> None:
        """What this training is to do; anew where it turns out to have other steps than was planned."""
        steps, agenda = self.host.max_steps, self.agenda
        if self.plan is None:
            tasked = any(isinstance(objective, TaskLoss) for objective in self.tutor.objectives)
            self.fit.decide(tasked, taught=self.tutor.given is not None)
            kept = self.parameters / self.reference_parameters
            agenda.plan, agenda.max_steps = planned(self.host, self.config, self.fit.steps, kept), steps
            if self.plan or self.fit.steps:
                self.pace.begin(self.fit.steps, self.fit.quicker)
            if self.fit.going:
                self.judge.measure()  # a metric that is not there is said before the training, not after it
        elif not self.fit.going and (agenda.anew or self.host.step < max(self.fit.last_step, agenda.stage_from)):
            begin_again(self)
        elif steps != agenda.max_steps:
            stretch(self)

    def train_on(self) -> None:
        """A training that is over, or was broken off, is followed by another one: see `again.begin_again`."""
        if self.plan is not None and not self.fit.going:
            self.pace.reset()
            self.agenda.anew = True

    def remember_initial(self) -> None:
        """Keep a copy of the model as the user passed it in."""
        if self.initial is None:
            self.initial = whole_copy(self.host.model)
            self.fingerprint, self.layout = fingerprint(self.initial), fingerprint(self.initial, 0)

    def begin_batch(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches of an accumulated batch, transformed and counted."""
        self._measure_cut()  # a loop goes on in the midst of what was broken off
        if not self.fit.going:
            for transform in self.parts.transforms:
                batches = [transform(self, batch) for batch in batches]
        return self.loss.begin_batch(self.host.model, batches)

    def is_due(self, step: int) -> bool:
        """Whether something that takes long follows the step: the end of the fit, a look, a cut."""
        return step >= self.fit.steps if self.fit.going else self.agenda.is_due(step)

    def after_step(self, step: int, leaving: bool = False) -> None:
        """An optimizer step is done, and the gradients are cleared.

        Args:
            leaving: what is due is left to the run that goes on from here.
        """
        if self.teacher is not None and type(self.teacher).update is not Teacher.update:
            self.teacher.update(plain.readable(self.host.model))
        if step < self.host.max_steps and not leaving:  # a cut after the last step could not be distilled
            self._advance(step)
            self._begin_distilling()

    def end(self) -> None:
        """Training is over: the last stage is judged, dropout comes back."""
        if self.fit.going:
            logger.warning("Training ended in the %d steps of fine-tuning: nothing was cut.", self.fit.steps)
        self._measure_cut()
        if self.agenda.open is not None:
            self._settle(self.measure())
        elif self.agenda.stays:
            conclude(self, self.measure())
        elif self.stages and not self.agenda.ended:
            self.measure()  # what was trained on after the last stage
            if self.stages[-1].accepted:
                self.agenda.change(**self.judge.last.at_the_end())
        self.agenda.ended = True
        for words in self.records.shortcomings(self.agenda, 1 - self.parameters / self.reference_parameters):
            logger.warning(words)
        if any(stage.accepted for stage in self.stages) and (text := self.judge.loss_of(self.judge.last)):
            logger.warning(text)
        self.dropout.restore()
        self.write_journal()

    def _advance(self, step: int) -> None:
        """What is due after `step` optimizer steps: the end of the fit, a look, a cut."""
        if self.fit.going:
            if step < self.fit.steps:
                return
            self._end_fit()
        look(self, step)
        cut = self.agenda.due(step)
        if cut is None:
            return
        measured = self.measure() if self.stages or self.judge.baseline.metrics is None else self.judge.baseline
        if self.judge.baseline.metrics is None:
            measured = self.judge.begin(measured)
        if self._may_cut(measured, step) and not self._target_met():
            # a stage that was settled just now may have its weights of just after the cut again
            self._cut(cut, step, self.judge.last if self.stages else measured)

    def _end_fit(self) -> None:
        """The model is fine-tuned: from here on it is the teacher, and the reference of all that follows."""
        self.initial = whole_copy(self.host.model)
        self.judge.begin(self.judge.measure())
        self.fit.end(self.judge.baseline.metrics)
        self.host.model_changed()
        self.host.reschedule()

    def _begin_distilling(self) -> None:
        """The reparameterization and the teacher of a model that no cut has given them."""
        if self.fit.going:
            return
        how = self.parts.reparameterization
        if how is not None and not is_reparameterized(self.host.model):
            self.host.install(plain.put_on(how, whole_copy(self.host.model)))
        if self.teacher is None:
            self.appoint_teacher()

    # -- rules --------------------------------------------------------------------------------------------------------

    def _meets_target(self) -> bool:
        target = self.config.target_reduction
        met = target is not None and self.parameters <= (1 - target) * self.reference_parameters
        return met and bool(self.stages)

    def _target_met(self) -> bool:
        if not self._meets_target():
            return False
        self.agenda.stopped = "target met"
        return True

    def measure(self) -> Measured:
        """The model now; once it is cut, beside the uncut one."""
        return self.judge.measure(self.initial if self.stages else None)

    def _may_cut(self, measured: Measured, step: int) -> bool:
        """Judge the open stage before the next cut; False where that cut is not made now."""
        judge, value = self.judge, measured.value
        if self.stages and judge.below_threshold(value):
            wait(self, step)
            return False
        self.agenda.retry_at = None
        if self.agenda.open is None:
            return True
        if not judge.dropped(value):
            if judge.spoiled(measured):
                repeat(self, step, measured)
                return False
            if judge.come_back(measured, self.fit.chance) is False:
                wait_or_stop(self, step, measured)
                return False
        return self._settle(measured)

    def _settle(self, measured: Measured) -> bool:
        """Judge the open stage for good; False if it was rolled back."""
        reason = settle(self, measured)
        if reason is not None:
            self._roll_back(reason)
        return reason is None

    # -- the cut ------------------------------------------------------------------------------------------------------

    def _cut(self, cut: PlannedCut, step: int, measured: Measured) -> None:
        self.dropout.restore()  # the reduced model must inherit the real rates
        keep = self.tutor.previous or self.judge.rolls_back
        before = plain.plain_copy(self.host.model) if keep else None
        try:
            reduction = reduced(self.host, self.config, cut, self.reference_parameters)
        except BudgetError as error:
            self._cannot_cut(error, measured)
            return
        stage = stage_of(cut, step, reduction, measured, self.judge.name)
        if reason := too_narrow(stage.sites, self.config.min_rank_ratio):
            logger.warning("Stage %d is not cut: %s.", cut.index, reason)
            self.stages.append(dataclasses.replace(stage, status="rejected", reason=reason))
            self.agenda.stopped = reason
            self._stay(measured)
            self.disable_dropout()
            self.write_journal()
            return
        self._apply(reduction, before, stage)
        suit(self, step)
        begin_stage(self, step)
        self.disable_dropout()
        self.reports.append(reduction.report)
        self.records.spectra(cut.index, reduction.report)
        self._measure_cut()

    def _measure_cut(self) -> None:
        """The model just after its cut: last of all, and again where it was broken off, for an evaluation takes long,
        and a model without its record could not go on."""
        if not self.judge.pending or self.agenda.open is None:
            return
        now = self.judge.measure(self.initial)
        self.judge.just_cut, self.judge.pending = now, False
        if now.value is None and now.divergence is None:
            self.keepsake.reset()
        self.agenda.change(metric_cut=now.value, metrics_cut=now.metrics)
        self.write_journal()
        self.records.log(self.stages[-1], self.parameters)

    def _cannot_cut(self, error: BudgetError, measured: Measured) -> None:
        """A later cut of several that cannot be made ends them: one that the spectra decide, or that goes beyond what
        the widths allow while the smallest model is looked for. Others raise."""
        untold = isinstance(error, NoTargetError)
        if not self.stages or not (untold or self.config.tolerance is not None):
            raise error
        why = "the spectra say nothing of a further cut" if untold else "there is no smaller size"
        self.agenda.stopped = f"{why} ({error.message if untold else error})"
        if self.stages[-1].accepted:
            self.agenda.change(reason=why)  # in a column of a table: the log has the whole
        logger.warning("No further cut is made: %s.", self.agenda.stopped)
        self._stay(measured)
        self.disable_dropout()

    def _stay(self, good: Measured) -> None:
        if self.config.tolerance is not None:
            stay(self, good)

    def _apply(self, reduction: Any, before: nn.Module | None, stage: Stage) -> None:
        self.host.install(plain.put_on(self.parts.reparameterization, reduction.model))
        self.stages.append(stage)
        self.agenda.repeats, self.judge.just_cut, self.judge.pending = 0, Measured(), True
        self.keepsake.keep()
        self.tutor.follow(reduction.projections, before)
        self._after_change()

    def _roll_back(self, reason: str) -> None:
        """The model before the stage comes back; it is the last one, so no cut follows."""
        logger.warning("Stage %d is rolled back: %s.", self.stages[-1].index, reason)
        self.dropout.restore()
        self.host.install(plain.put_on(self.parts.reparameterization, clean_copy(self.tutor.before)))
        self.tutor.step_back()
        self.agenda.stopped = reason
        self.keepsake.reset()
        self._after_change()
        failed = self.stages[-1]
        self._stay(Measured(failed.metrics_before, failed.metric_before))
        self.disable_dropout()
        self.records.log(self.stages[-1], self.parameters)
        self.write_journal()

    def _after_change(self) -> None:
        self.host.model_changed()
        self.appoint_teacher()

    def disable_dropout(self) -> None:
        if self.config.disable_dropout and any(stage.accepted for stage in self.stages):
            self.dropout.disable(self.host.model)

    def appoint_teacher(self) -> None:
        """Who teaches from here on, by the recipe and the model at hand."""
        restored, self.restored = self.restored, None
        self.tutor.appoint(
            self.host.model,
            self.initial,
            lambda: self.host.calibration_batches(strip=False),
            self.host.optimizer,
            restored,
            self.host.columns.for_calibration,
        )
        load_transforms(self.parts.transforms, restored or {})

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """{"values": JSON-able, "tensors": by name}: all that a resumed run needs beside the model's own weights."""
        return run_state(self)

    def load_state_dict(self, state: dict[str, Any], where: str = "the checkpoint") -> None:
        """Take up the run of that state; the model gets its architecture, not yet its weights.

        Args:
            where: it lies, for errors.

        Raises:
            RMTKDError: another model, recipe or other parts than that run started with.
        """
        self.remember_initial()
        load_run_state(self, state, where)

    def restore_cores(self) -> None:
        """After the plain weights of that checkpoint were loaded: the tensors that they were folded from."""
        if cores := checkpoint.subset("core", self.restored or {}):
            how, model = self.parts.reparameterization, self.host.model
            self.host.install(plain.put_on(how, whole_copy(model), cores), prepare=False)

    def write_journal(self) -> None:
        """What is known so far."""
        self.records.journal(self.stages, self.reference_parameters, self.parameters, self.fit.to_dict())
