"""How the commands train: options, the trainer's arguments, and checkpoints that delete nobody's files."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..checkpoints import Found, checkpoints_in, fault_of, newest_whole, tidy
from ..errors import RMTKDError
from ..files import check_writable
from ..folders import RECORD, listed, survey
from ..signals import Terminated
from ..validation import AtLeastZero, Count, Interval, Positive, check_fields
from .options import option
from .output import Inputs, check_place
from .threads import THREADS


if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ..trainer import RMTKDTrainer, RMTKDTrainingArguments


__all__ = [
    "TrainingOptions",
    "check_checkpoints",
    "how_to_continue",
    "train",
    "training_arguments",
]

KEPT = 2  # checkpoints
FIT_RATE, RATE = 5e-5, 1e-4  # peak learning rates of compress: of a fine-tuning, without one


@dataclass(frozen=True)
class TrainingOptions:
    """How the narrowed model is distilled."""

    train: bool = option(True, "Distil after the cut. --no-train: one cut, no training.")
    fit: bool = option(
        False,
        "Fine-tune the model on the data before the first cut, for --fit-share of the steps (where that is not given: "
        "0.4 of many, up to 0.6 of few, at up to 1.5 times the learning rate, as a trainer does). It may then be one "
        "straight from pretraining: it gets a new head for the labels of the data.",
    )
    epochs: Positive = option(1.0, "Passes over the training rows.")
    max_steps: Annotated[int, Interval(-1)] = option(
        -1, "Stop after so many optimizer steps; -1: as many as the epochs need."
    )
    threads: Count | None = option(None, THREADS)
    batch_size: Count = option(32, "Rows in one step on one device.")
    eval_batch_size: Count = option(64, "Rows in one forward pass when evaluating.")
    learning_rate: Positive | None = option(
        None,
        "Peak learning rate of AdamW. None: compress takes 5e-5 where it fine-tunes first (--fit) and 1e-4 elsewhere, "
        "ternary 3e-4. compress moves that of the distillation to what the size of the cut and the number of steps "
        "stand, and says so in the log; --distil-learning-rate sets it.",
    )
    weight_decay: AtLeastZero = option(0.01, "Weight decay of AdamW.")
    warmup_steps: Annotated[int, Interval(0)] = option(0, "Steps of linear warm-up.")
    gradient_accumulation_steps: Count = option(1, "Batches summed up into one step.")
    bf16: bool = option(False, "Train in bfloat16 mixed precision.")
    attn_implementation: str | None = option(
        None,
        "Attention kernel, not stored with the model. None: transformers' choice. On a CPU with --bf16, eager trains "
        "quicker.",
        choices=("eager", "sdpa"),
    )
    logging_steps: Count = option(100, "Steps between two lines of the training log.")
    checkpoints: str | None = option(
        None, "Folder for checkpoints: kept, and continued from if it already holds one. None: no checkpoints."
    )
    save_steps: Count = option(500, "Steps between two checkpoints.")

    def __post_init__(self):
        check_fields(self, as_options=True)
        if self.checkpoints is not None and not self.train:
            raise RMTKDError("--checkpoints and --no-train: a cut alone has no checkpoints. Drop one of them.")
        if self.fit and not self.train:
            raise RMTKDError("--fit and --no-train: a cut alone trains nothing. Drop one of them.")


def training_arguments(
    training: TrainingOptions, seed: int, folder: Path, learning_rate: float, **others: Any
) -> RMTKDTrainingArguments:
    """Arguments of the trainer; without checkpoints it writes into `folder`/trainer, which the command removes.

    Args:
        learning_rate: where the options say none.
    """
    import torch

    from ..trainer import RMTKDTrainingArguments

    return RMTKDTrainingArguments(
        output_dir=training.checkpoints or str(folder / "trainer"),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=learning_rate if training.learning_rate is None else training.learning_rate,
        weight_decay=training.weight_decay,
        warmup_steps=training.warmup_steps,
        bf16=training.bf16,
        logging_steps=training.logging_steps,
        save_strategy="steps" if training.checkpoints else "no",
        save_steps=training.save_steps,
        seed=seed,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        **others,
    )


def check_checkpoints(folder: str | None, inputs: Inputs = ()) -> None:
    """Refuse a folder of checkpoints that cannot be used, before anything is loaded.

    Args:
        inputs: what it must be apart from, see `output.check_place`; the checkpoints among them do not count.

    Raises:
        RMTKDError: it cannot be written to, holds something else, or there are checkpoints in it of which none is ours
            and whole.
    """
    if folder is None:
        return
    check_writable(folder)
    place = check_place(folder, [entry for entry in inputs if entry[0] != "--checkpoints"], "checkpoints")
    if not place.is_dir():
        return
    if (place / RECORD).exists():
        raise RMTKDError(
            f"--checkpoints {folder} is the output of an earlier run ({RECORD} lies there), whose record would be "
            "replaced. Choose a folder of its own."
        )
    files = [path.name for path in place.glob("checkpoint-*") if not path.is_dir() and path.name[11:].isdigit()]
    if files:
        raise RMTKDError(f"--checkpoints {folder}: {listed(files)} in it is a file, where a folder would be made.")
    tidy(place)
    found = _newest(place)
    if found.newest is None and found.passed:
        last, fault = found.passed[0]
        raise RMTKDError(
            f"--checkpoints {folder}: {last.name} in it is another trainer's or is not whole ({fault}), so it cannot "
            "be continued from, nor can any other there. Move it away, or choose a folder of its own."
        )
    for path, fault in found.passed:
        print(f"{path} is passed over ({fault}); the run continues from {found.newest.name}", file=sys.stderr)


def _newest(folder: Path) -> Found:
    """The newest checkpoint that is whole, and as it was written where a record says how that was."""
    passed = []
    for path in reversed(checkpoints_in(folder)):
        fault = fault_of(path) or _changed(path)
        if fault is None:
            return Found(path, tuple(passed))
        passed.append((path, fault))
    return Found(None, tuple(passed))


def _changed(checkpoint: Path) -> str | None:
    found = survey(checkpoint)
    if found is None:
        return None
    if found.missing:
        return f"{listed(found.missing)} missing"
    return f"{listed(found.changed)} changed since" if found.changed else None


def train(trainer: RMTKDTrainer, training: TrainingOptions) -> None:
    """Train, from the newest whole checkpoint where there is one; an interrupted user is told how to continue.

    transformers' own `save_total_limit` removes whatever is called checkpoint-N, with all that lies in it. Here each
    new checkpoint is recorded, and recorded ones are cleared.
    """
    from ..folders import write_record

    newest = None
    if training.checkpoints is not None:
        trainer.sealed = write_record
        trainer.add_callback(_keep_latest(training.checkpoints))
        there = Path(training.checkpoints)
        newest = _newest(there).newest if there.is_dir() else None
    try:
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    except (KeyboardInterrupt, Terminated):
        print(f"\n{how_to_continue(training)}", file=sys.stderr)
        raise


def _keep_latest(folder: str, count: int = KEPT) -> TrainerCallback:
    """A callback that clears all recorded checkpoints but the last `count`."""
    from transformers import TrainerCallback

    from ..folders import remove_recorded

    class KeepLatest(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            ours = [path for path in checkpoints_in(folder) if (path / RECORD).is_file()]
            for path in ours[:-count]:
                remove_recorded(path)

    return KeepLatest()


def how_to_continue(training: TrainingOptions) -> str:
    """What an interrupted user is told."""
    folder = training.checkpoints
    if folder is None:
        return "Nothing is kept of this training: with --checkpoints DIR it could be continued."
    last = newest_whole(folder).newest
    if last is None:
        return f"No checkpoint yet in {folder}: one is written every {training.save_steps} steps (--save-steps)."
    return f"The same command continues from {last}."
