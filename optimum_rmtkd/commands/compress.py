"""`optimum-cli rmtkd compress`: cut, distil, evaluate, save."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import RMTKDConfig
from ..errors import RMTKDError
from .base import Command, set_help
from .data import DataArguments, check_files, read_by
from .options import add_options, add_recipe_options, from_options, recipe_from_options
from .output import OVERWRITE, comparison, format_table, weight_bytes, writing_beside
from .threads import use_threads
from .training import (
    FIT_RATE,
    RATE,
    TrainingOptions,
    check_checkpoints,
    train,
    training_arguments,
)


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..trainer import Stage
    from .task import Task


__all__ = ["CompressCommand"]

RECIPE_NAME = "rmtkd_recipe.json"

USAGE = "optimum-cli rmtkd compress --model MODEL (--train-file FILE | --dataset NAME) -o OUT [options]"

DESCRIPTION = """\
Narrow a fine-tuned text or image classifier (or regressor), or a causal or masked language model, distil it from its
former self, and save it with its tokenizer or image processor. With --fit it is fine-tuned here first, and may come
straight from pretraining. No width is chosen by hand: give the share of parameters to remove, a time
(--target-latency) or what may be lost of the metric (--tolerance). Without one, only sites whose spectrum has a
separated bulk of noise are cut; where there is none, the command asks for a share and shows what sizes are predicted
to cost.
"""

EPILOG = """\
examples:
  remove 80 % of the parameters of a text classifier and distil for one epoch
    optimum-cli rmtkd compress --model ./my-bert --train-file train.csv --validation-file dev.csv \\
        --target-reduction 0.8 -o ./my-bert-small
  only cut: no training, a few seconds
    optimum-cli rmtkd compress --model ./my-bert --train-file train.csv --validation-file dev.csv \\
        --target-reduction 0.5 --no-train -o ./my-bert-cut
  a model straight from pretraining: fine-tune it on a part of the steps, cut it, distil it on the rest
    optimum-cli rmtkd compress --fit --model ./bert --train-file train.csv --validation-file dev.csv \\
        --target-reduction 0.8 --epochs 3 -o ./my-bert-small
  without the tokens that the training texts do not use, and then narrowed: the target counts both
    optimum-cli rmtkd compress --trim-vocabulary --model ./my-bert --train-file train.csv --validation-file dev.csv \\
        --target-reduction 0.63 -o ./my-bert-small
  the smallest model that loses at most half a point of accuracy: without training, and distilled in rounds
    optimum-cli rmtkd compress --model ./my-bert --train-file train.csv --validation-file dev.csv \\
        --tolerance 0.5 --no-train -o ./my-bert-small
    optimum-cli rmtkd compress --model ./my-bert --train-file train.csv --validation-file dev.csv \\
        --tolerance 0.5 --epochs 3 -o ./my-bert-small
  half the time of a pass at batch 1 and 64 tokens, on one thread of this machine
    optimum-cli rmtkd compress --model ./my-bert --train-file train.csv --validation-file dev.csv \\
        --target-latency 0.5 --latency-length 64 --latency-threads 1 -o ./my-bert-quick
  a causal (or masked) language model on plain text: perplexity before and after, by a sliding window
    optimum-cli rmtkd compress --model ./llama --train-file stories.jsonl --text-column text --max-length 256 \\
        --target-reduction 0.2 -o ./llama-small
  two text columns, and a dataset of the Hub
    optimum-cli rmtkd compress --model org/bert-mrpc --dataset glue --dataset-config mrpc \\
        --text-column sentence1 sentence2 --target-reduction 0.6 -o ./small
  an image classifier on a folder of images, one sub-folder for each class
    optimum-cli rmtkd compress --model ./my-vit --train-file ./train --validation-file ./test \\
        --target-reduction 0.63 -o ./small
  a csv with names, for a model whose classes are LABEL_0 and LABEL_1
    optimum-cli rmtkd compress --model ./my-bert --train-file train.csv --label-map bad=LABEL_0 good=LABEL_1 \\
        --target-reduction 0.63 -o ./small
  other objectives, and weights trained as matrix product operators (OPDF), which are folded before saving
    optimum-cli rmtkd compress --model ./my-bert --train-file train.csv --target-reduction 0.8 \\
        --objectives '{"task": {"weight": 0.5}, "skew_kl": {"alpha": 0.1}}' --reparameterization mpo -o ./small
  the schedule and the edge of the paper
    optimum-cli rmtkd compress --model ./my-bert --train-file train.csv --edge-estimator mp_quantile --tau 0.5 \\
        --schedule layerwise --teacher previous -o ./small

reload:
  import optimum_rmtkd
  model = AutoModelForSequenceClassification.from_pretrained("./my-bert-small")

OUT appears only when everything has succeeded. With --overwrite the files that an earlier run wrote into OUT
(rmtkd_files.json lists them) are replaced; whatever else lies there stays. OUT must be a folder of its own, apart from
the model, the data, the checkpoints and the working directory. For training on several devices use
examples/text_classification.py.
"""


class CompressCommand(Command):
    @staticmethod
    def parse_args(parser):
        set_help(parser, DESCRIPTION, EPILOG, USAGE)
        parser.add_argument(
            "--model",
            required=True,
            help="Hub name or local folder of a fine-tuned classifier or a language model; with --fit, of any model.",
        )
        parser.add_argument("-o", "--output", required=True, metavar="OUT", help="Folder of the reduced model.")
        parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
        parser.add_argument(
            "--trim-vocabulary",
            action="store_true",
            help="First drop the tokens that the training texts do not use (see trim); counts towards the target.",
        )
        parser.add_argument(
            "--save-dtype",
            choices=("auto", "float32", "float16", "bfloat16"),
            default="auto",
            help="Number format of the saved weights. Default: auto, that of the original checkpoint.",
        )
        parser.add_argument(
            "--push-to-hub",
            nargs="?",
            const="",
            metavar="REPO",
            help="Also upload OUT to the Hub. Default REPO: the name of OUT, in your own name space.",
        )
        add_options(parser, DataArguments, "data")
        add_options(parser, TrainingOptions, "training")
        add_recipe_options(parser)

    def execute(self) -> None:
        data = from_options(DataArguments, self.args)
        training = from_options(TrainingOptions, self.args)
        recipe = recipe_from_options(self.args)
        _check_fit(training, recipe)
        _check_cut_alone(training, recipe)
        check_files(data)
        _check_single_process()
        if self.args.push_to_hub is not None:
            _check_can_push(self.args.push_to_hub)
        from ..hub import write_card

        inputs = read_by(self.args, data, training.checkpoints)
        with writing_beside(self.args.output, self.args.overwrite, inputs) as folder:
            check_checkpoints(training.checkpoints, inputs)
            trim = self.args.trim_vocabulary
            table = _compress(self.args.model, data, training, recipe, self.args.save_dtype, folder, trim)
            write_card(folder, Path(self.args.output).absolute().name)
        print(table)
        print(f"saved to {self.args.output}")
        if self.args.push_to_hub is not None:
            _push(Path(self.args.output), self.args.push_to_hub)


def _check_fit(training: TrainingOptions, recipe: RMTKDConfig) -> None:
    """Does the recipe's share of fine-tuning fit the other options?"""
    if training.fit and recipe.fit_share == 0:
        raise RMTKDError("--fit and --fit-share 0: the one fine-tunes first, the other never does. Drop one of them.")
    if recipe.fit_share and not training.train:
        raise RMTKDError(
            f"--no-train and --fit-share {recipe.fit_share:g}: a cut alone trains nothing. Drop one of them."
        )


def _fits(training: TrainingOptions, recipe: RMTKDConfig) -> bool:
    """Whether the model is fine-tuned first, whatever it can do."""
    return training.fit or bool(recipe.fit_share)


def _check_cut_alone(training: TrainingOptions, recipe: RMTKDConfig) -> None:
    """What would be ignored without training is refused."""
    idle = [n for n in ("objectives", "reparameterization", "transforms") if getattr(recipe, n) is not None]
    idle += ["schedule none"] if recipe.schedule == "none" else []
    if recipe.tolerance is not None:
        idle += [name.replace("_", "-") for name in ("rounds", "round_share") if getattr(recipe, name) is not None]
    if idle and not training.train:
        raise RMTKDError(
            f"--no-train and {', '.join('--' + name for name in idle)}: a cut alone trains nothing, and is one cut. "
            "Drop one of them."
        )


def _check_single_process() -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise RMTKDError(f"compress runs in one process, this is one of {world}: use examples/text_classification.py.")


def _check_can_push(repo: str) -> None:
    """Hours of training should not end at a missing login."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import validate_repo_id

    try:
        if repo:
            validate_repo_id(repo)
        HfApi().whoami()
    except (HTTPError, OSError, ValueError) as error:
        raise RMTKDError(
            f"--push-to-hub {repo}: {error}. Log in with 'hf auth login', or leave the option out and upload OUT "
            "later with 'hf upload'."
        ) from error


@dataclass(frozen=True)
class Made:
    """A reduced model and how it came about.

    Attributes:
        stages: records of the cuts.
        history: lines of the training log.
        fit: the journal's record of the fine-tuning before the first cut; None without one.
        remarks: what is printed above the table.
    """

    model: PreTrainedModel
    stages: tuple[Stage, ...]
    remarks: tuple[str, ...] = ()
    history: tuple[dict, ...] = ()
    fit: dict | None = None


def _check_cut(task: Task, training: TrainingOptions, recipe: RMTKDConfig) -> None:
    """What cannot work is refused before the first expensive step."""
    from ..surgery import check_data, check_edges, check_latency, check_recipe, check_variety

    check_recipe(task.model, recipe)
    if recipe.schedule == "none":
        return
    loader = task.calibration_loader(training.batch_size, recipe.seed)
    check_data(task.model, itertools.islice(loader, 1), recipe)
    check_variety(loader)
    check_latency(task.model, recipe)
    check_edges(task.model, task.calibration_loader(training.batch_size, recipe.seed), recipe)


def _compress(
    name: str,
    data: DataArguments,
    training: TrainingOptions,
    recipe: RMTKDConfig,
    save_dtype: str,
    folder: Path,
    trim: bool = False,
) -> str:
    """Fill `folder` with the reduced model and return the table before / after."""
    from ..hub import write_results
    from ..hub.measures import of_quality
    from ..hub.run import public_name
    from ..spectra.edges import find_estimator
    from ..surgery import count_parameters, uncut_parameters
    from ..trainer.parts import parts_of
    from ..trainer.stages import write_journal
    from .task import load_task, stored_dtype, weights_folder

    use_threads(training.threads)
    parts_of(recipe)  # unknown parts are refused before anything is loaded
    find_estimator(recipe.edge_estimator)
    head = "made" if _fits(training, recipe) else "required"
    asked = recipe.calibration_samples if recipe.calibration_samples != RMTKDConfig.calibration_samples else None
    task = load_task(name, data, recipe.seed, training.attn_implementation, head, trim, asked)
    _check_cut(task, training, recipe)
    whole, uncut = task.untrimmed or task, uncut_parameters(task.model)
    parameters = count_parameters(whole.model)
    before = {} if task.new_head else whole.measure(whole.model, training.eval_batch_size)
    task, whole = dataclasses.replace(task, untrimmed=None), None  # two models are one too many for a training
    made = (_distil if training.train else _cut)(task, training, recipe, folder)
    if made.fit is not None:  # the model that was cut is the fine-tuned one
        before = of_quality(made.fit.get("metrics") or before)

    dtype = stored_dtype(name) if save_dtype == "auto" else save_dtype
    model = _rounded_to(made.model, dtype)
    metrics = {"before": before, "after": task.measure(model, training.eval_batch_size)}
    _save(model, dtype, task, folder)
    recipe.to_json_file(folder / RECIPE_NAME)
    counts = parameters, count_parameters(model)
    stages = made.stages if training.train else _measured(made.stages, metrics, task.judged_by)
    write_journal(folder, stages, recipe, *counts, fit=made.fit, metrics=metrics)
    sizes = weight_bytes(weights_folder(name)), weight_bytes(folder)
    judged = {moment: values.get(task.judged_by) for moment, values in metrics.items()}
    write_results(
        folder,
        base_model=public_name(name),
        parameters=counts,
        bytes=sizes,
        metric={"name": task.metric} | judged,
        dataset=data.described() | {"rows": len(task.validation)},
        log_history=made.history,
        training=dataclasses.asdict(training) | {"checkpoints": None},
        recipe=recipe.to_dict(),
        vocabulary=task.vocabulary and task.vocabulary.to_dict(),
    )
    return "\n".join([*made.remarks, _told(task, counts, uncut, sizes, metrics, made.fit)])


def _measured(stages: Sequence[Stage], metrics: dict[str, dict[str, float]], judged_by: str) -> list[Stage]:
    """The records of a cut without training, measured before and after; sizes that were only tried have their own."""
    before, after = metrics["before"], metrics["after"]
    figures = {"metrics_before": before, "metrics_cut": after, "metrics_after": after, "metric_name": judged_by}
    figures |= {
        f"metric_{moment}": figures[f"metrics_{moment}"].get(judged_by) for moment in ("before", "cut", "after")
    }
    return [dataclasses.replace(stage, **figures) if stage.accepted else stage for stage in stages]


def _told(
    task: Task,
    counts: tuple[int, int],
    uncut: int,
    sizes: tuple[int, int],
    metrics: dict[str, dict[str, float]],
    fit: dict | None,
) -> str:
    """The table before / after, and what was lost."""
    from ..hub.measures import metric_changes
    from ..surgery import loss_warning

    values = [metrics[moment].get(task.judged_by) for moment in ("before", "after")]
    rows = comparison(parameters=counts, size=sizes, metric=task.metric, values=tuple(values))
    if uncut > counts[0]:
        rows.insert(1, ("removed of the uncut model", *(f"{1 - size / uncut:.1%}" for size in counts), ""))
    rows += metric_changes(metrics["before"], metrics["after"], without=[task.metric])
    rows += [(*row, "") for row in task.vocabulary.rows() if row[0] != "parameters"] if task.vocabulary else []
    table = format_table(("", "before" if fit is None else "fine-tuned", "after", "change"), rows)
    table += "".join(f"\n{note}" for note in task.vocabulary.notes()) if task.vocabulary else ""
    if warning := loss_warning(task.metric, *values, greater_is_better=task.greater_is_better):
        table += f"\nwarning: {warning}"
    return table


def _cut(task: Task, training: TrainingOptions, recipe: RMTKDConfig, folder: Path) -> Made:
    """One cut without training: a single stage, not yet measured; or the sizes that were tried for a tolerance."""
    from ..hub import write_spectra
    from ..surgery import reduce
    from ..surgery.untargeted import asks_for_edges
    from ..trainer import Stage
    from .finding import found_size

    if recipe.tolerance is not None:
        return Made(*found_size(task, training, recipe, folder))
    loader = task.calibration_loader(training.batch_size, recipe.seed)
    reduction = reduce(task.model, loader, recipe, trust_edges=asks_for_edges(recipe))
    said = () if reduction.latency is None else (reduction.latency.words(),)
    stage = Stage(
        index=0,
        step=0,
        sites=tuple(site.to_dict() for site in reduction.sites),
        parameters_before=reduction.parameters_before,
        parameters_after=reduction.parameters_after,
        target_reduction=recipe.target_reduction,
        status="accepted",
        reason="cut without training",
        note=said[0] if said else None,
    )
    write_spectra(folder, stage.index, reduction.report)
    return Made(reduction.model, (stage,), remarks=said)


def _distil(task: Task, training: TrainingOptions, recipe: RMTKDConfig, folder: Path) -> Made:
    """The whole schedule of cuts and distillation; the spectra of each cut go into `folder`."""
    from ..hub.run import SPECTRA
    from ..trainer import RMTKDTrainer

    rate = FIT_RATE if _fits(training, recipe) else RATE
    judged = {"metric_for_best_model": task.trained_by, "greater_is_better": task.greater_is_better}
    args = training_arguments(training, recipe.seed, folder, rate, **judged)
    trainer = RMTKDTrainer(
        model=task.model,
        args=args,
        rmtkd_config=recipe,
        train_dataset=task.train,
        eval_dataset=task.validation,
        processing_class=task.processor,
        data_collator=task.collator,
        compute_metrics=task.compute_metrics,
    )
    trainer.run.fit.asked = training.fit
    train(trainer, training)
    if (spectra := Path(args.output_dir) / SPECTRA).is_file():
        shutil.copyfile(spectra, folder / SPECTRA)
    fit = trainer.run.fit.to_dict()
    if fit is not None and task.compute_metrics is None:  # what a Trainer's evaluations know is not all of the task
        fit |= {"metrics": task.measure(trainer.run.initial, training.eval_batch_size)}
    return Made(
        trainer.accelerator.unwrap_model(trainer.model),
        tuple(trainer.stages),
        history=tuple(trainer.state.log_history),
        fit=fit,
    )


def _rounded_to(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """The same float32 model with the values it will have on disk, so that what is evaluated is what is saved."""
    import torch

    return model if dtype == "float32" else model.to(getattr(torch, dtype)).to(torch.float32)


def _save(model: PreTrainedModel, dtype: str, task: Task, folder: Path) -> None:
    import torch

    shutil.rmtree(folder / "trainer", ignore_errors=True)
    model.to("cpu", getattr(torch, dtype)).save_pretrained(folder)
    task.processor.save_pretrained(folder)


def _push(folder: Path, repo: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # failed connections, too

    from ..folders import add_to_record, survey
    from ..hub import write_card
    from ..hub.card import card_files

    api = HfApi()
    try:
        repo_id = api.create_repo(repo or folder.absolute().name, exist_ok=True).repo_id
        write_card(folder, repo_id)
        add_to_record(folder, card_files(folder))
        ours = survey(folder)  # what else lies in the folder is nobody's business
        url = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Reduced with optimum-rmtkd",
            allow_patterns=list(ours.own) if ours else None,
        )
    except (HTTPError, OSError, ValueError) as error:
        raise RMTKDError(
            f"The model is saved in {folder}, but it could not be uploaded: {error}. Log in with 'hf auth login', "
            f"then 'hf upload {repo or folder.name} {folder}'."
        ) from error
    print(f"pushed to {url}")
