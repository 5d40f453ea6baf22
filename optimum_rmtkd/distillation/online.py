"""A teacher with small trained modules, which moves towards what the student can follow."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import RMTKDError
from ..validation import AtLeastZero, Count, Positive, Seed, checked
from .features import capture
from .objectives.divergences import KLDivergence
from .objectives.task import TaskLoss
from .step import DistillationStep
from .teachers import Teacher, fingerprint


__all__ = ["OnlineTeacher"]


class OnlineTeacher(Teacher):
    """OKD: LoRA modules on a frozen teacher are trained beside the student, which sees their answers without a
    gradient.

    The teacher's own loss is CE(p, y) + pull KL(q || p), p its prediction, q the student's (held fixed); on unlabelled
    data the second term alone. Costs a backward pass through the teacher. Needs PEFT (`pip install
    "optimum-rmtkd[peft]"`).

    Args:
        model: a teacher; copied, the original stays as it is.
        rank, target_modules: of the LoRA modules; None: every linear layer but the head.
        pull: weight of the second term.
        learning_rate: of the modules; follows the trainer's schedule.

    Reference: "Online knowledge distillation" (OKD), arXiv 2409.12512. The form of the two losses is this library's
    reading of its abstract.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        rank: Count = 8,
        target_modules: str | Sequence[str] | None = None,
        pull: AtLeastZero = 1.0,
        learning_rate: Positive = 1e-4,
        seed: Seed = 0,
    ):
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise RMTKDError(
                'OnlineTeacher needs PEFT for its modules; install it with pip install "optimum-rmtkd[peft]".'
            ) from error
        self._origin = fingerprint(model)
        model = copy.deepcopy(model).requires_grad_(False)
        targets = target_modules or _backbone_layers(model)
        if not targets:
            raise RMTKDError(
                f"OnlineTeacher found no linear layer inside {type(model).__name__}; name modules that LoRA can take: "
                "target_modules=[...]."
            )
        config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = inject_adapter_in_model(config, model)
        super().__init__(model)
        self.pull, self.learning_rate = pull, learning_rate
        self.rank, self.target_modules, self.seed = rank, target_modules, seed
        self._trained = [p for name, p in model.named_parameters() if "lora_" in name]
        for parameter in self._trained:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()  # PEFT makes them in the teacher's dtype: bf16 loses small steps
        self._task, self._kl, self._live = TaskLoss(), KLDivergence(), None

    @property
    def origins(self) -> tuple[str, ...]:
        """Fingerprint of the model that was given: without the modules."""
        return (self._origin,)

    def describe(self) -> dict[str, Any]:
        settings = {"rank": self.rank, "pull": self.pull, "learning_rate": self.learning_rate}
        return super().describe() | settings | {"target_modules": self.target_modules, "seed": self.seed}

    def parameters(self) -> list[nn.Parameter]:
        return list(self._trained)

    def __call__(
        self, inputs: Mapping[str, Any], paths: Iterable[str] = (), drop: Iterable[str] = ()
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        kept = self.accepted(inputs)  # labels included: they are what its own loss needs
        with capture(self.model, paths) as features:
            self._live = self.model(**kept | self._named)
        detached = {k: v.detach() if torch.is_tensor(v) else v for k, v in self._live.items() if k != "loss"}
        return detached, {path: feature.detach() for path, feature in features.items()}

    def loss(self, step: DistillationStep) -> torch.Tensor | None:
        if self._live is None:
            return None
        live, self._live = self._live, None
        student = {k: v.detach() for k, v in step.student_outputs.items() if torch.is_tensor(v)}
        own = dataclasses.replace(step, student_outputs=live, teacher_outputs=student, task_loss=None)
        self._kl.setup(self.model, None, {})
        total = self.pull * self._kl(own)
        return total if live.get("loss") is None else total + self._task(own)


def _backbone_layers(model: nn.Module) -> list[str]:
    """Paths of the linear layers of the backbone: no heads, no decoder of a vocabulary."""
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers

    inner = set(getattr(model, "base_model", model).modules())
    if getattr(model, "get_output_embeddings", None) is not None:
        inner.discard(model.get_output_embeddings())
    return [
        path for path, module in model.named_modules() if module in inner and isinstance(module, (nn.Linear, Conv1D))
    ]
