"""A training loop in the shape of transformers' run_glue_no_trainer.py, on the toy task."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import get_scheduler
from transformers.data import default_data_collator

from optimum_rmtkd import RMTKDConfig, RMTKDLoop
from optimum_rmtkd.checkpoints import step_of

from .conftest import RECIPE, tiny_bert, toy_data


def prepared(
    model=None,
    rows=None,
    batch_size=8,
    max_steps=8,
    accumulation=1,
    by_hand=False,
    mixed_precision=None,
    schedule="linear",
    warmup=0,
    rate=1e-3,
    optimizer="adamw",
    project_dir=None,
    seedable=True,
):
    """What a script has in its hands when it has prepared everything."""
    AcceleratorState._reset_state()  # of an earlier script in this process
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=1 if by_hand else accumulation,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable),
        project_dir=project_dir,
    )
    set_seed(0)
    model = tiny_bert() if model is None else model
    rows = toy_data() if rows is None else rows
    train = DataLoader(rows, shuffle=True, collate_fn=default_data_collator, batch_size=batch_size)
    validation = DataLoader(toy_data(16, seed=2), collate_fn=default_data_collator, batch_size=8)
    decayed = [p for name, p in model.named_parameters() if "bias" not in name]
    others = [p for name, p in model.named_parameters() if "bias" in name]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer](groups, lr=rate)
    ticks = max_steps * accelerator.num_processes
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=ticks)
    model, optimizer, train, validation, scheduler = accelerator.prepare(
        model, optimizer, train, validation, scheduler
    )
    return SimpleNamespace(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        train=train,
        validation=validation,
        scheduler=scheduler,
        max_steps=max_steps,
        accumulation=accumulation,
        by_hand=by_hand,
    )


def evaluate(script):
    """As a script does, and it leaves the model in evaluation mode."""
    script.model.eval()
    hits, losses = [], []
    for batch in script.validation:
        with torch.no_grad():
            outputs = script.model(**batch)
        predictions, labels = script.accelerator.gather_for_metrics((outputs.logits.argmax(-1), batch["labels"]))
        hits.append(predictions == labels)
        losses.append(script.accelerator.gather(outputs.loss.reshape(1)))
    return {"accuracy": torch.cat(hits).float().mean().item(), "loss": torch.cat(losses).mean().item()}


def looped(script, recipe=None, **options):
    """The RMTKDLoop of a script."""
    given = {"evaluate": lambda: evaluate(script), "max_steps": script.max_steps} | options
    return RMTKDLoop(
        script.accelerator,
        script.model,
        script.optimizer,
        script.train,
        given.pop("lr_scheduler", script.scheduler),
        rmtkd_config=RMTKDConfig(**(RECIPE | (recipe or {}))),
        **given,
    )


def train(
    script, loop, resume=None, save_to=None, save_every=None, stop_at=None, end=True, between=None, called="step_{}"
):
    """The loop itself; (losses, learning rates) by optimizer step. `between` is called after each epoch, `called` is
    the name of a checkpoint."""
    accelerator, model, optimizer = script.accelerator, script.model, script.optimizer
    done, losses, rates = 0, {}, {}
    if resume is not None:
        accelerator.load_state(str(resume))
        done = step_of(resume)
    an_epoch = -(-len(script.train) // script.accumulation)
    first, skipped = divmod(done, an_epoch)
    last = script.max_steps if stop_at is None else stop_at
    for epoch in range(first, -(-script.max_steps // an_epoch)):
        model.train()
        script.train.set_epoch(epoch)
        batches = script.train
        if epoch == first and skipped:
            batches = accelerator.skip_first_batches(batches, skipped * script.accumulation)
        for number, batch in enumerate(batches, start=skipped * script.accumulation if epoch == first else 0):
            whole = (number + 1) % script.accumulation == 0 or number == len(script.train) - 1
            with contextlib.nullcontext() if script.by_hand else accelerator.accumulate(model):
                loss = loop.loss(batch)
                accelerator.backward(loss / script.accumulation if script.by_hand else loss)
                if not script.by_hand or whole:
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    script.scheduler.step()
                    optimizer.zero_grad()
            if whole:
                done += 1
                losses[done], rates[done] = loss.item(), script.scheduler.get_last_lr()[0]
                if save_to is not None and done % save_every == 0:
                    accelerator.save_state(str(Path(save_to) / called.format(done)))
            if done >= last:
                break
        if between is not None:
            between()
        if done >= last:
            break
    if end:
        loop.end()
    return losses, rates
