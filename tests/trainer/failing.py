"""Launched by torchrun: a short run that breaks in one process; each writes what it ended with."""

from __future__ import annotations

import json
import resource
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers

from optimum_rmtkd.config import RMTKDConfig
from optimum_rmtkd.trainer import RMTKDTrainer, RMTKDTrainingArguments

from ..distributed.sharding import open_the_door, options
from .conftest import RECIPE, tiny_bert, toy_data
from .looping import looped, prepared, train


SHARDED = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


class Breaking(transformers.TrainerCallback):
    def __init__(self, raise_it):
        self.raise_it = raise_it

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.raise_it()


def fill_the_disk():
    """From here on this process can write no file of a size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    BEGUN.append(time.time())


BEGUN = []


def by_trainer(out: Path, breaks, moment: str, kind: str | None = None):
    if kind is not None:
        open_the_door()
    sharded = {} if kind is None else options(state_dict_type=kind)
    arguments = {"max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 2, "use_cpu": True, "report_to": []}
    trainer = RMTKDTrainer(
        model=tiny_bert(),
        args=RMTKDTrainingArguments(str(out / "run"), disable_tqdm=True, **arguments, **sharded),
        rmtkd_config=RMTKDConfig(**RECIPE),
        train_dataset=toy_data(),
        eval_dataset=toy_data(16, seed=2),
    )
    if breaks(trainer.args.process_index):
        if moment in ("callback", "disk"):
            trainer.add_callback(Breaking(raising(moment) if moment == "callback" else fill_the_disk))
        else:
            owner, name = {
                "journal": (trainer.run.records, "journal"),
                "measure": (trainer, "evaluate"),
                "save": (trainer, "_save_checkpoint"),
            }[moment]
            setattr(owner, name, raising(moment))
    return trainer.args.process_index, trainer.train


def by_loop(out: Path, breaks, moment: str):
    script = prepared(rows=toy_data(), batch_size=4, max_steps=4)
    loop = looped(script, RECIPE)
    rank = script.accelerator.process_index
    if breaks(rank):
        if moment == "measure":
            loop._host.evaluate = raising(moment)
        elif moment == "journal":
            loop.run.records.journal = raising(moment)
        else:
            script.optimizer.optimizer.register_step_post_hook(lambda *_: fill_the_disk())
    return rank, lambda: train(script, loop, save_to=out / "run", save_every=2)


def raising(moment: str):
    def raise_it(*_, **__):
        raise OSError(f"the {moment} broke")

    return raise_it


def main():
    out, driver, broken, moment = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    made = {"trainer": by_trainer, "loop": by_loop} | {kind: partial(by_trainer, kind=kind) for kind in SHARDED}
    rank, run = made[driver](out, lambda rank: rank == broken, moment)
    try:
        run()
    except Exception as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        (out / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        (out / f"moments-{rank}.json").write_text(json.dumps([*BEGUN[:1], time.time()]))
        raise


if __name__ == "__main__":
    main()
