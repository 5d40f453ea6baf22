"""The ways in which transformers can train, and what becomes of them when the model is cut on the way.

The one declaration: `test_modes` runs it, `docs/guides/modes.md` shows it. `python -m tests.trainer.modes` prints that
table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import EarlyStoppingCallback

from optimum_rmtkd.errors import RMTKDError

from .conftest import tiny_bert, toy_data


@dataclass(frozen=True)
class Mode:
    """One way of training.

    Attributes:
        arguments: of the training arguments, beside those of `make_trainer`.
        shown: how the documentation names it; None: by its arguments.
        given: from a model, what else the trainer gets.
        dtype: of the weights.
        refused: kind of the error, and the beginning of what it says after its subject. None: it works.
        note: for the documentation.
        needs: a package without which it is not tried.
        quick: a representative of its kind.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    shown: str | None = None
    given: Callable[[torch.nn.Module], dict[str, Any]] = lambda model: {}
    dtype: torch.dtype = torch.float32
    refused: tuple[type[Exception], str] | None = None
    note: str = ""
    needs: str | None = None
    quick: bool = False

    @property
    def title(self) -> str:
        return self.shown or ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())

    @property
    def outcome(self) -> str:
        """A cell of the table in the documentation."""
        if self.refused is None:
            return "works" + (f"; {self.note}" if self.note else "")
        return f"refused, `{self.refused[0].__name__}`: {self.note}"


class Stream(torch.utils.data.IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        yield from toy_data()


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Batched:
    """Accuracy that is told one batch after the other."""

    def __init__(self):
        self.right = []

    def __call__(self, prediction, compute_result: bool):
        logits, labels = (torch.as_tensor(x) for x in (prediction.predictions, prediction.label_ids))
        self.right += (logits.argmax(-1) == labels).tolist()
        if compute_result:
            right, self.right = self.right, []
            return {"accuracy": sum(right) / len(right)}
        return {}


def sees_inputs(prediction):
    assert prediction.inputs is not None and prediction.losses is not None
    return accuracy(prediction)


def optimizers(kind: type = torch.optim.AdamW, schedule: Callable | None = None, **options):
    """What a user passes in."""

    def given(model):
        optimizer = kind(model.parameters(), lr=1e-3, **options)
        return {"optimizers": (optimizer, None if schedule is None else schedule(optimizer))}

    return given


BEST = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "accuracy"}
MEASURED = {"compute_metrics": accuracy}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
BY_HOOKS = "steps inside the backward pass, by hooks on the parameters that a cut replaces"

PRECISION = [
    Mode({"bf16": True}, quick=True),
    Mode({"fp16": True}),
    Mode({"bf16_full_eval": True, **EVALUATED}),
    Mode({"fp16_full_eval": True, **EVALUATED}),
    Mode(shown="weights in bfloat16", dtype=torch.bfloat16, note="with a warning: steps are rounded"),
    Mode({"torch_compile": True, "torch_compile_backend": "eager"}, quick=True),
    Mode({"torch_compile": True, "torch_compile_backend": "aot_eager", "bf16": True}),
    Mode({"torch_compile": True, "torch_compile_backend": "inductor", "torch_compile_mode": "default"}),
    Mode(
        {"use_liger_kernel": True},
        refused=(RMTKDError, "its kernels are put into"),
        note="its kernels are put into the layers of one architecture",
        quick=True,
    ),
    Mode({"full_determinism": True}),
    Mode(
        {"debug": "underflow_overflow"},
        refused=(RMTKDError, "it watches the very layers that a cut replaces"),
        note="it watches the layers that a cut replaces",
    ),
]
MEMORY = [
    Mode({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    Mode(
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        given=lambda model: {"objectives": ["task", "kl"]},
        note="with objectives that read no hidden states",
    ),
    Mode({"activation_checkpointing": True}),
    Mode({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}),
    Mode({"gradient_accumulation_steps": 2}),
    Mode({"torch_empty_cache_steps": 1}),
    Mode({"auto_find_batch_size": True}),
    Mode({"skip_memory_metrics": False}),
    Mode({"max_grad_norm": 0.0}),
    Mode({"max_grad_norm": 1e-3}),
    Mode({"neftune_noise_alpha": 5.0}),
    Mode({"label_smoothing_factor": 0.1}),
    Mode({"average_tokens_across_devices": False}),
    Mode({"use_cache": True}),
]
OPTIMIZERS = [
    *(Mode({"optim": name}) for name in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop")),
    Mode({"optim": "adagrad"}, quick=True),
    *(Mode({"optim": name}, needs="torchao") for name in ("adamw_torch_4bit", "adamw_torch_8bit")),
    *(
        Mode({"optim": name}, refused=(RMTKDError, "it steps inside the backward pass"), note=BY_HOOKS)
        for name in (
            "galore_adamw_layerwise",
            "galore_adafactor_layerwise",
            "apollo_adamw_layerwise",
            "lomo",
            "adalomo",
        )
    ),
    Mode(shown="optimizers=(None, None)", given=lambda model: {"optimizers": (None, None)}),
    Mode(shown="optimizers=(AdamW, None)", given=optimizers()),
    Mode(shown="optimizers=(Adagrad, None)", given=optimizers(torch.optim.Adagrad)),
    Mode(
        shown="optimizers=(SGD with momentum, StepLR)",
        given=optimizers(torch.optim.SGD, lambda o: torch.optim.lr_scheduler.StepLR(o, 2), momentum=0.9),
    ),
    Mode(
        shown="optimizers=(AdamW, OneCycleLR)",
        given=optimizers(schedule=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=10)),
    ),
]
SCHEDULES = [
    *(
        Mode({"lr_scheduler_type": name})
        for name in ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "inverse_sqrt")
    ),
    Mode({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}),
    Mode({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}),
    Mode({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}}),
    Mode({"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}}),
    Mode({"lr_scheduler_type": "reduce_lr_on_plateau", **EVALUATED}, note="it counts anew after each cut"),
    Mode({"lr_scheduler_type": "greedy", **EVALUATED}, note="it counts anew after each cut"),
    Mode({"warmup_steps": 0.3}),
]
DATA = [
    Mode({"train_sampling_strategy": "group_by_length"}),
    Mode({"train_sampling_strategy": "sequential"}),
    Mode({"train_sampling_strategy": "batch_rebalance"}),
    Mode(shown="an iterable train_dataset", given=lambda model: {"train_dataset": Stream()}),
    Mode(
        {"max_steps": -1},
        shown="an iterable train_dataset without max_steps",
        given=lambda model: {"train_dataset": Stream()},
        refused=(RMTKDError, "has no length"),
        note="the cuts are spread over the steps",
    ),
    Mode({"max_steps": -1, "num_train_epochs": 1.5, "per_device_train_batch_size": 16}),
    Mode({"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2}),
    Mode({"dataloader_drop_last": True, "per_device_train_batch_size": 12}),
    Mode({"dataloader_pin_memory": False}),
    Mode({"data_seed": 7}),
    Mode({"accelerator_config": {"split_batches": True}}),
    Mode({"accelerator_config": {"dispatch_batches": False, "even_batches": False, "use_seedable_sampler": False}}),
    Mode(
        {
            "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
            "gradient_accumulation_steps": 2,
        }
    ),
    Mode({"remove_unused_columns": False}),
    Mode({"include_num_input_tokens_seen": "all"}),
]
EVALUATION = [
    *(Mode({"eval_strategy": name}) for name in ("no", "epoch")),
    Mode(EVALUATED),
    Mode({**EVALUATED, "eval_on_start": True}),
    Mode({**EVALUATED, "eval_delay": 3}),
    Mode({**EVALUATED, "prediction_loss_only": True}),
    Mode({**EVALUATED, "eval_accumulation_steps": 1}, given=lambda model: MEASURED),
    Mode({**EVALUATED, "eval_use_gather_object": True}, given=lambda model: MEASURED),
    Mode({**EVALUATED, "eval_do_concat_batches": False}),
    Mode(
        {**EVALUATED, "include_for_metrics": ["inputs", "loss"]}, given=lambda model: {"compute_metrics": sees_inputs}
    ),
    Mode({**EVALUATED, "batch_eval_metrics": True}, given=lambda model: {"compute_metrics": Batched()}),
    Mode(
        {**BEST, "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1},
        shown="EarlyStoppingCallback",
        given=lambda model: MEASURED | {"callbacks": [EarlyStoppingCallback(1)]},
        note="patience counts from the last cut",
    ),
]
SAVING = [
    Mode({"save_strategy": "epoch"}),
    Mode({"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}),
    Mode({"save_strategy": "steps", "save_steps": 2, "save_only_model": True}, note="such a run cannot be resumed"),
    Mode({"save_strategy": "best", **BEST}, given=lambda model: MEASURED, quick=True),
    Mode({"save_strategy": "best", **BEST, "load_best_model_at_end": True}, given=lambda model: MEASURED),
    Mode({"save_strategy": "steps", "save_steps": 2, "enable_jit_checkpoint": True}),
    Mode({"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": True}),
    Mode({"ignore_data_skip": True}),
    Mode({"hub_model_id": "somebody/something", "hub_strategy": "end", "hub_private_repo": True}),
    Mode({"logging_strategy": "epoch"}),
    Mode({"logging_first_step": True, "logging_nan_inf_filter": False}),
]
KINDS = {
    "Precision and compilation": PRECISION,
    "Memory and the loss": MEMORY,
    "Optimizers": OPTIMIZERS,
    "Learning rates": SCHEDULES,
    "Data": DATA,
    "Evaluation": EVALUATION,
    "Saving and logging": SAVING,
}
MODES = [mode for modes in KINDS.values() for mode in modes]


def model_of(mode: Mode) -> torch.nn.Module:
    return tiny_bert().to(mode.dtype)


def table() -> str:
    """The tables of the documentation."""
    parts = []
    for kind, modes in KINDS.items():
        rows = [f"| `{mode.title}` | {mode.outcome} |" for mode in modes]
        parts.append("\n".join([f"## {kind}\n", "| training arguments | with cuts |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(table())
