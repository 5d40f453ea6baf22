"""Tiny runs that go on by themselves: the same call begins, and continues, and ends with weights in `out`/final."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, RMTKDTrainingArguments, newest_checkpoint

from ..commands.conftest import save_bert, sentence_rows, write_csv
from ..trainer.conftest import RECIPE, tiny_bert, toy_data
from ..trainer.looping import looped, prepared, train


STEPS, EVERY = 9, 2
PHASES = {"fit_share": 0.3, "target_reduction": 0.6, "rounds": 2, "stage_share": 0.5}  # fit, two cuts, distillation


def trainer(out: Path) -> None:
    """A script with RMTKDTrainer."""
    torch.set_num_threads(1)
    arguments = RMTKDTrainingArguments(
        str(out),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=1e-3,
        logging_steps=2,
        save_strategy="steps",
        save_steps=EVERY,
        save_total_limit=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    made = RMTKDTrainer(
        model=tiny_bert(),
        args=arguments,
        train_dataset=toy_data(),
        eval_dataset=toy_data(16, seed=2),
        rmtkd_config=RMTKDConfig(**(RECIPE | PHASES)),
    )
    made.remove_callback(transformers.PrinterCallback)
    going_on = out.is_dir() and get_last_checkpoint(str(out)) is not None
    made.train(resume_from_checkpoint=going_on or None)
    made.save_model(str(out / "final"))
    _leave(made.accelerator)


def last(out: Path) -> None:
    """A script with a loop of its own, whose checkpoints all have one name."""
    loop(out, called="last")


def loop(out: Path, called: str = "step_{}") -> None:
    """A script with a loop of its own."""
    torch.set_num_threads(1)
    script = prepared(max_steps=STEPS)
    made = looped(script, PHASES)
    train(script, made, resume=newest_checkpoint(out), save_to=out, save_every=EVERY, called=called)
    if script.accelerator.is_main_process:
        script.accelerator.unwrap_model(script.model).save_pretrained(out / "final")
    _leave(script.accelerator)


def compress(out: Path) -> None:
    """The command; model and tables lie beside `out`, see `compress_inputs`."""
    from optimum.commands import optimum_cli

    torch.set_num_threads(1)
    inputs = out.parent / "inputs"
    words = ["--model", inputs / "model", "--train-file", inputs / "train.csv", "-o", out / "final", "--overwrite"]
    words += ["--validation-file", inputs / "validation.csv", "--checkpoints", out / "runs", "--save-steps", EVERY]
    words += ["--max-steps", STEPS, "--batch-size", 8, "--min-width", 4, "--round-to", 4]
    words += ["--calibration-samples", 32, "--fit-share", 0.3, "--rounds", 2, "--target-reduction", 0.5]
    out.mkdir(exist_ok=True)
    sys.argv = ["optimum-cli", "rmtkd", "compress", *map(str, words)]
    optimum_cli.main()


def compress_inputs(folder: Path) -> None:
    """What `compress` reads."""
    inputs = folder / "inputs"
    inputs.mkdir()
    save_bert(inputs / "model")
    write_csv(inputs / "train.csv", sentence_rows(64))
    write_csv(inputs / "validation.csv", sentence_rows(16, seed=1))


def _leave(accelerator) -> None:
    if accelerator.num_processes > 1:
        from ..distributed.leaving import PartialState

        accelerator.wait_for_everyone()
        PartialState().destroy_process_group()
