"""What is trained beside the student and never saved with it: adapters of objectives, modules of an online teacher.

Knows optimizers and processes, no trainer and no run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..distillation import DistillationObjective, Teacher


__all__ = ["Companions"]

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Companions:
    """An AdamW of their own for parameters outside the model.

    The trainer's optimizer is created before they exist (they follow the architecture and the calibration data), may
    be the user's, and DDP sees only the model's parameters: so their gradients are averaged over the processes here,
    clipped by themselves, and stepped with the trainer's schedule.

    Args:
        host: has the `accelerator` of the moment; a search over hyperparameters makes another one for each trial.
    """

    def __init__(
        self,
        host: Any,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_grad_norm: float | None = 1.0,
    ):
        self.host, self.betas, self.eps, self.max_grad_norm = host, betas, eps, max_grad_norm
        self.parameters: list[nn.Parameter] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.base_rate: float | None = None  # what the schedule multiplies: the rate of an optimizer that was given

    @property
    def accelerator(self) -> Any:
        """The processes of the run."""
        return self.host.accelerator

    def collect(self, objectives: Iterable[DistillationObjective], teacher: Teacher, main: Any) -> None:
        """Take the parameters of the objectives and the teacher as they are now; moments of earlier ones are
        dropped.

        Args:
            main: the student's optimizer.
        """
        if self.base_rate is None:
            first = main.param_groups[0]
            self.base_rate = first.get("initial_lr", first["lr"])
        own = [p for objective in objectives for p in objective.parameters() if p.requires_grad]
        groups = [
            {"params": own, "lr": self.base_rate},
            {"params": teacher.parameters(), "lr": getattr(teacher, "learning_rate", self.base_rate)},
        ]
        groups = [group for group in groups if group["params"]]
        self.parameters = [p for group in groups for p in group["params"]]
        if not groups:
            self.optimizer = None
            return
        self.optimizer = torch.optim.AdamW(groups, betas=self.betas, eps=self.eps, weight_decay=0.0)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]

    def step(self, main: Any) -> None:
        """One update from the gradients of the accumulated batch, at the schedule of the student's optimizer. Nothing
        happens where they overflowed (fp16)."""
        if self.optimizer is None:
            return
        accelerator = self.accelerator
        scale = 1.0 if accelerator.scaler is None else 1.0 / accelerator.scaler.get_scale()
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if accelerator.num_processes > 1:
                parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
            parameter.grad.mul_(scale)
        if all(bool(torch.isfinite(parameter.grad).all()) for parameter in self.parameters):
            if self.max_grad_norm:
                nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
            share = main.param_groups[0]["lr"] / self.base_rate if self.base_rate else 1.0
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * share
            self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameters and moments, by number."""
        tensors = {"base_rate": torch.tensor(self.base_rate, dtype=torch.float64)} if self.parameters else {}
        for number, parameter in enumerate(self.parameters):
            tensors[f"{number}/parameter"] = parameter.detach()
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"{number}/{name}": state[name] for name in MOMENTS if name in state}
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `state_dict`."""
        if "base_rate" in tensors:  # a schedule without a memory of it (plateau) may have lowered the rate since
            self.base_rate = float(tensors["base_rate"])
        for number, parameter in enumerate(self.parameters):
            parameter.copy_(tensors[f"{number}/parameter"])
            found = {name: tensors[f"{number}/{name}"] for name in MOMENTS if f"{number}/{name}" in tensors}
            if found:
                self.optimizer.state[parameter] = {
                    name: tensor if name == "step" else tensor.to(parameter.device) for name, tensor in found.items()
                }
