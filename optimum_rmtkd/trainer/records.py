"""What a run leaves behind while it lives: journal, spectra, lines in the log. Knows a host and plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..config import RMTKDConfig
from ..hub.run import write_spectra
from .agenda import Agenda
from .host import Writing
from .judge import Measured
from .stages import PlannedCut, Stage, write_journal


__all__ = ["Records", "stage_of"]


class Records:
    """Writes nothing on a process whose host has no folder."""

    def __init__(self, host: Writing, config: RMTKDConfig):
        self.host, self.config = host, config

    def journal(self, stages: Sequence[Stage], reference: int, parameters: int, fit: dict[str, Any] | None) -> None:
        """`rmtkd_stages.json` as things stand."""
        if self.host.folder is not None:
            write_journal(self.host.folder, stages, self.config, reference, parameters, fit=fit)

    def shortcomings(self, agenda: Agenda, reached: float) -> Iterator[str]:
        """What a run that is over has not done, in words.

        Args:
            reached: share of the uncut model's parameters that is gone.
        """
        target, met = self.config.target_reduction, False
        cut = agenda.next_cut()
        if target is not None:
            met = reached >= target - 0.01
        if cut is not None and agenda.stages and not met:
            waited = "had not come back" if self.config.stage_threshold is None else "stayed below stage_threshold"
            waited = f", and the validation metric {waited}" if agenda.waits else ""
            yield (
                f"{len(agenda.plan) - cut.index} of {len(agenda.plan)} planned cuts were not made (the next one was "
                f"due at step {cut.step + agenda.delay}{waited})."
            )
        if self.config.tolerance is not None and agenda.stages and agenda.standing is None:
            yield (
                f"No round kept tolerance={self.config.tolerance:g}: the model is uncut. Allow more, remove less in a "
                "round (round_share), or give each more steps."
            )
        if target is not None and not met:
            why = agenda.stopped or ("all planned stages are done" if cut is None else "cuts are missing")
            yield (
                f"The model is reduced by {100 * reached:.1f} %, target_reduction asks for {100 * target:.1f} % "
                f"({why})."
            )

    def spectra(self, index: int, report: Any) -> None:
        """The spectra that a cut was made from."""
        if self.host.folder is not None:
            write_spectra(self.host.folder, index, report)

    def log(self, stage: Stage, parameters: int) -> None:
        """One line in the training log."""
        line = {"rmtkd/stage": stage.index, "rmtkd/parameters": parameters}
        if stage.metric_cut is not None:
            line[f"rmtkd/{stage.metric_name}"] = stage.metric_cut
        if stage.learning_rate is not None:
            line["rmtkd/learning_rate"] = stage.learning_rate
        self.host.log(line)


def stage_of(cut: PlannedCut, step: int, reduction: Any, measured: Measured, metric_name: str) -> Stage:
    """The record of a cut that is about to be made."""
    return Stage(
        index=cut.index,
        step=step,
        sites=tuple(site.to_dict() for site in reduction.sites),
        parameters_before=reduction.parameters_before,
        parameters_after=reduction.parameters_after,
        target_reduction=cut.target_reduction,
        metric_name=metric_name if measured.value is not None else None,
        metric_before=measured.value,
        metrics_before=measured.metrics,
        predicted_loss=reduction.predicted_loss if reduction.loss_unit == "nats" else None,
        divergence=reduction.divergence,
        note=None if reduction.latency is None else reduction.latency.words(),
    )
