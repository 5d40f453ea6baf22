"""Launched by torchrun: one short run with cuts under FSDP2; every process writes what it ended with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers

from optimum_rmtkd.config import RMTKDConfig
from optimum_rmtkd.trainer import RMTKDTrainer, RMTKDTrainingArguments

from ..trainer.conftest import tiny_bert, toy_data
from .leaving import leave
from .sharding import join, open_the_door, options, tensors, zero


def parsed(given=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--plain", action="store_true", help="without FSDP")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--resume", default=None)
    parser.add_argument("--recipe", type=json.loads, default={})
    parser.add_argument("--arguments", type=json.loads, default={})
    parser.add_argument("--config", type=json.loads, default={}, help="of fsdp")
    parser.add_argument("--stage", type=int, help="of DeepSpeed's ZeRO, in place of fsdp")
    parser.add_argument("--parts", type=json.loads, default={}, help="of the trainer")
    parser.add_argument("--ruined", action="store_true", help="the metric falls in every stage")
    parser.add_argument("--loaded", type=Path, help="model to load once the arguments are made")
    parser.add_argument("--partitioned", action="store_true", help="it has to be, under ZeRO-3")
    parser.add_argument("--again", action="store_true", help="evaluated before, and trained once more after")
    parser.add_argument("--model", type=json.loads, default={}, help="its config, where it is another one")
    parser.add_argument("--double", action="store_true", help="in fp64, where rounding hides nothing")
    return parser.parse_args(given)


def trainer_of(asked):
    fsdp = not asked.plain and asked.stage is None
    if fsdp:
        open_the_door()
    uniform = torch.ones(10, dtype=torch.long)  # means over tokens are then the same however a batch is split
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": asked.batch_size,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.01,
        "optim": "sgd",
        "logging_steps": 1,
        "save_steps": 4,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    recipe = {
        "target_reduction": 0.6,
        "rounds": 2,
        "stage_share": 0.4,
        "fit_share": 0,
        "calibration_samples": 48,
        "min_width": 4,
        "round_to": 4,
    }
    arguments |= asked.arguments
    if asked.stage is not None:
        arguments["deepspeed"] = zero(asked.stage)
    if asked.ruined:
        arguments |= {"metric_for_best_model": "score", "greater_is_better": True}
        asked.parts["compute_metrics"] = lambda _: falling(trainer.run)
    if arguments["learning_rate"]:  # what is known of rates was measured on real models
        recipe["distil_learning_rate"] = arguments["learning_rate"]
    args = RMTKDTrainingArguments(
        str(asked.out / "run"),
        **(arguments | (options(**asked.config) if fsdp else {})),
    )
    trainer = RMTKDTrainer(
        model=model_of(asked),
        args=args,
        rmtkd_config=RMTKDConfig(**(recipe | asked.recipe)),
        train_dataset=[dict(sample, attention_mask=uniform) for sample in toy_data()],
        eval_dataset=toy_data(16, seed=2),
        **asked.parts,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def model_of(asked):
    if asked.loaded is None:
        model = tiny_bert(**asked.model)
        return model.double() if asked.double else model
    join()
    model = transformers.BertForSequenceClassification.from_pretrained(asked.loaded)
    assert any(hasattr(p, "ds_id") for p in model.parameters()) is asked.partitioned
    return model


def falling(run) -> dict[str, float]:
    """A metric that is well until the first step after a cut."""
    stage = run.agenda.open
    return {"score": 0.9 if stage is None or run.host.step == stage.step else 0.1}


class Look(transformers.TrainerCallback):
    """What teaches while the model is distilled."""

    def __init__(self, trainer):
        self.trainer, self.teachers = trainer, set()

    def on_step_begin(self, args, state, control, **_):
        if (teacher := self.trainer.run.teacher) is not None:
            self.teachers.add(type(teacher.model).__name__)


def run(asked):
    """The trainer, when all is written."""
    trainer = trainer_of(asked)
    given, look = trainer.model, Look(trainer)
    trainer.add_callback(look)
    if asked.again:
        before = trainer.evaluate()["eval_loss"] if trainer.args.deepspeed_plugin.zero_stage == 3 else None
    output = trainer.train(resume_from_checkpoint=asked.resume)
    if asked.again:
        assert before is None or abs(before - trainer.stages[0].metric_before) < 1e-5
        trainer.train()
    trainer.save_model(str(asked.out / "final"))
    rank = trainer.args.process_index
    weights = tensors(trainer.model)
    torch.save(weights, asked.out / f"weights-{rank}.pt")
    values = {
        "processes": trainer.args.world_size,
        "class": type(trainer.model).__name__,
        "engine": type(trainer.model_wrapped).__name__,
        "sharded": sum(hasattr(p, "full_tensor") for p in trainer.model.parameters()),
        "teachers": sorted(look.teachers),
        "alias": set(given.state_dict()) == set(weights),
        "kept": trainer.model is given,
        "stages": [stage.to_dict() for stage in trainer.stages],
        "spectra": [{s.name: s.subspace.eigenvalues.tolist() for s in report.sites} for report in trainer.reports],
        "losses": {
            f"{e['step']}/{k}": v for e in trainer.state.log_history for k, v in e.items() if k.startswith("loss")
        },
        "rates": {e["step"]: e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e},
        "best": trainer.state.best_model_checkpoint,
        "evaluated": trainer.evaluate()["eval_loss"],
        "reduction": output.metrics["reduction"],
    }
    (asked.out / f"result-{rank}.json").write_text(json.dumps(values))
    return trainer


def main():
    torch.set_num_threads(1)
    leave(run(parsed()).accelerator)


if __name__ == "__main__":
    main()
