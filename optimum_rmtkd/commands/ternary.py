"""`optimum-cli rmtkd ternary`: ternary networks from features, or in place of a part of a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CalibrationError, RMTKDError
from ..ternary.config import TernaryConfig
from .base import Command, set_help
from .data import DataArguments, check_files, read_by
from .options import add_options, from_options
from .output import OVERWRITE, format_table, weight_bytes, writing_beside
from .tables import UNREADABLE
from .threads import use_threads
from .training import TrainingOptions, check_checkpoints, train, training_arguments


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from .task import Task


__all__ = ["TernaryCommand"]

RATE = 3e-4  # peak learning rate of the straight-through training, where none is given

USAGE = """optimum-cli rmtkd ternary --model MODEL --module PATH (--train-file FILE | --dataset NAME) -o OUT [options]
       optimum-cli rmtkd ternary --features FILE [--test-features FILE] -o OUT [options]"""

DESCRIPTION = """\
Replace a part of a fine-tuned model (a classifier head, a feed-forward network) by a fully-connected network whose
hidden weights are -1, 0 or 1, stored in 1.6 bits each; or fit such a network to given features. Random weights: only
the readout is fitted, nothing is trained. --weights trained: the part's own weights are rounded and trained on, with
the model as teacher. It makes files smaller, not inference faster.
"""

EPILOG = """\
examples:
  the feed-forward network of a block, its own weights rounded, trained for one epoch, packed
    optimum-cli rmtkd ternary --model ./my-distilbert --module distilbert.transformer.layer.0.ffn \\
        --train-file train.csv --validation-file dev.csv --weights trained --epochs 1 -o ./out
  the body narrowed by 40 %, then the head replaced: one run, one checkpoint
    optimum-cli rmtkd ternary --model ./my-bert --module classifier --train-file train.csv \\
        --target-reduction 0.4 -o ./out
  features of your own: arrays x (rows, features) and y (class of each row, or numbers) in one file
    optimum-cli rmtkd ternary --features train.npz --test-features test.npz --hidden 2000 2000 1000 -o ./head
  step activations with matched kernels; nothing stored but a seed
    optimum-cli rmtkd ternary --features train.npz --mode min_shift --levels 4 --storage seed -o ./head

reload:
  import optimum_rmtkd
  model = AutoModelForSequenceClassification.from_pretrained("./out")   # a model with a ternary part
  head = AutoModel.from_pretrained("./head")                            # head(features=x).logits

OUT appears only when everything has succeeded. --overwrite replaces what an earlier run wrote into it, nothing else.
"""


class TernaryCommand(Command):
    @staticmethod
    def parse_args(parser):
        set_help(parser, DESCRIPTION, EPILOG, USAGE)
        parser.add_argument("--model", help="Hub name or local folder of a fine-tuned classifier.")
        parser.add_argument("--module", metavar="PATH", help="Part to replace, for example classifier.")
        parser.add_argument("--features", metavar="FILE", help="Arrays x and y: .npz or .safetensors.")
        parser.add_argument(
            "--test-features", metavar="FILE", help="The same, to measure on; also fits two other readouts."
        )
        parser.add_argument("-o", "--output", required=True, metavar="OUT", help="Folder of the new model.")
        parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
        parser.add_argument(
            "--target-reduction",
            type=float,
            metavar="X",
            help="Narrow the rest of the model first: share of its parameters.",
        )
        parser.add_argument(
            "--batch-size", type=int, default=32, help="Rows in one forward pass or step. Default: 32."
        )
        add_options(parser, DataArguments, "data (with --model)")
        add_options(parser, TernaryConfig, "ternary network (fields of TernaryConfig)")
        add_options(parser, TrainingOptions, "training (with --weights trained)", skip=("batch_size", "fit"))

    def execute(self) -> None:
        args = self.args
        config = from_options(TernaryConfig, args)
        if (args.model is None) == (args.features is None):
            raise RMTKDError("Expected either --model (with --module) or --features.")
        if args.model is not None and args.module is None:
            raise RMTKDError("--model needs --module, the part to replace, for example --module classifier.")
        _refuse_unused(args, config)
        if args.features is None:
            data = from_options(DataArguments, args)
            training = dataclasses.replace(from_options(TrainingOptions, args), batch_size=args.batch_size)
            check_files(data)
            inputs = read_by(args, data, training.checkpoints)
        else:
            inputs = [("the features", args.features), ("the features", args.test_features)]
        use_threads(getattr(args, "threads", None))  # an option that is not given leaves no trace
        with writing_beside(args.output, args.overwrite, inputs) as folder:
            if args.features is not None:
                table = _from_features(args.features, args.test_features, config, folder)
            else:
                check_checkpoints(training.checkpoints, inputs)
                table = _in_a_model(args, data, training, config, folder)
        print(table)
        print(f"saved to {args.output}")


def _refuse_unused(args, config: TernaryConfig) -> None:
    """An option without effect is a mistake of whoever gave it."""
    fields = {kind: {item.name for item in dataclasses.fields(kind)} for kind in (DataArguments, TrainingOptions)}
    rules = (
        (args.features is not None, {"module", "target_reduction", "targets", *fields[DataArguments]}, "--model"),
        (args.model is not None, {"test_features"}, "--features"),
        (
            config.weights == "random",
            {"scale", *fields[TrainingOptions] - {"batch_size", "eval_batch_size", "threads"}},
            "--weights trained",
        ),
        (config.weights == "trained", {"hidden", "activation", "targets", "ridge"}, "--weights random"),
        (config.mode != "min_shift", {"levels"}, "--mode min_shift"),
    )
    for applies, names, needed in rules:
        given = sorted(name for name in names if getattr(args, name, None) is not None)
        if applies and given:
            raise RMTKDError(f"--{given[0].replace('_', '-')} has no effect here: it belongs to {needed}.")


# -- features ---------------------------------------------------------------------------------------------------------


def _from_features(file: str, test_file: str | None, config: TernaryConfig, folder: Path) -> str:
    from ..ternary import compress_features

    x, y = _arrays(file)
    test = _like(_arrays(test_file), test_file, x, y) if test_file else None
    model, report = compress_features(x, y, config)
    model.save_pretrained(folder)
    if test is None:
        return report.table()
    rows = [("this network", weight_bytes(folder), _score(model, *test))]
    dense = compress_features(x, y, config.replace(storage="dense", mode="weights_only"))[0]
    rows.append(
        ("dense random network", 4 * sum(t.numel() for t in dense.state_dict().values()), _score(dense, *test))
    )
    linear = _linear(x, y)
    rows.append(("linear readout", 4 * sum(t.numel() for t in linear.parameters()), _score(linear, *test)))
    name = "mean squared error" if y.is_floating_point() else "accuracy"
    cells = [(row[0], f"{row[1]:,}", f"{row[2]:.4f}") for row in rows]
    return f"{report.table()}\n\n{format_table(('on ' + Path(test_file).name, 'bytes', name), cells)}"


def _arrays(file: str) -> tuple[Tensor, Tensor]:
    """x and y of a file."""
    from zipfile import BadZipFile

    import numpy as np
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(file).is_file():
        raise RMTKDError(f"{file}: no such file; expected .npz or .safetensors with arrays x and y.")
    try:
        if Path(file).suffix == ".safetensors":
            found = load_file(file)
        else:
            with np.load(file, allow_pickle=False) as arrays:
                found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (*UNREADABLE, BadZipFile, SafetensorError) as error:
        raise RMTKDError(
            f"{file} cannot be read ({error}); expected .npz or .safetensors with arrays x and y."
        ) from error
    if not {"x", "y"} <= set(found):
        raise RMTKDError(
            f"{file} holds {', '.join(sorted(found)) or 'nothing'}; expected arrays x (rows, features) and y."
        )
    return found["x"], found["y"]


def _like(test: tuple[Tensor, Tensor], file: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The arrays to measure on.

    Raises:
        CalibrationError: they do not go with those to fit to.
    """
    fits = (
        test[0].dim() == x.dim() == 2
        and len(test[0]) == len(test[1]) > 0
        and test[0].shape[1:] == x.shape[1:]
        and test[1].shape[1:] == y.shape[1:]
        and test[1].is_floating_point() == y.is_floating_point()
    )
    if not fits:
        raise CalibrationError(
            f"{file} holds x {tuple(test[0].shape)} and y {tuple(test[1].shape)}, {test[1].dtype}; expected as many "
            f"rows of both, with x (rows, {x.shape[-1]}) and y ({', '.join(map(str, ('rows', *y.shape[1:])))}), "
            f"{y.dtype}, as in the features to fit to."
        )
    return test


def _linear(x: Tensor, y: Tensor):
    """Ridge regression on the features themselves: what a head has to beat."""
    import torch

    from ..ternary.readout import fit_readout, one_hot

    targets = y.reshape(len(y), -1) if y.is_floating_point() else one_hot(y.long(), int(y.max()) + 1)
    fit, linear = fit_readout(x, targets), torch.nn.Linear(x.shape[1], targets.shape[1])
    linear.weight.data, linear.bias.data = fit.weight.float(), fit.bias.float()
    return linear


def _score(model, x: Tensor, y: Tensor) -> float:
    """Accuracy, or mean squared error."""
    import torch

    with torch.no_grad():
        out = model(x.float())
    logits = getattr(out, "logits", out)
    if y.is_floating_point():
        return float((logits - y.reshape(len(y), -1)).square().mean())
    return float((logits.argmax(1) == y).float().mean())


# -- a part of a model ------------------------------------------------------------------------------------------------


def _in_a_model(args, data: DataArguments, training: TrainingOptions, config: TernaryConfig, folder: Path) -> str:
    from ..config import RMTKDConfig
    from ..surgery import narrow
    from ..ternary import compress_head, pack_model
    from ..ternary.capture import find_part
    from .compress import _rounded_to, _save
    from .language import LanguageTask
    from .task import evaluate, load_task, stored_dtype, weights_folder

    recipe = RMTKDConfig(target_reduction=args.target_reduction, seed=config.seed)
    task = load_task(args.model, data, config.seed, training.attn_implementation)
    if isinstance(task, LanguageTask):
        raise RMTKDError(
            f"'{args.model}' is a language model; expected a fine-tuned classifier, whose head is replaced. Give one."
        )
    find_part(task.model, args.module)  # a wrong path is refused before the first forward pass
    before, body = evaluate(task, task.model, training.eval_batch_size), task.model
    if args.target_reduction is not None:
        body = narrow(body, task.calibration_loader(args.batch_size, config.seed), recipe)
    model, report = compress_head(body, args.module, task.calibration_loader(args.batch_size, config.seed), config)
    if config.weights == "trained":
        if training.train:
            _train(model, task, training, config.seed, folder)
        model = pack_model(model, config.storage)
    dtype = stored_dtype(args.model)
    model = _rounded_to(model, dtype)
    after = evaluate(task, model, training.eval_batch_size)
    _save(model, dtype, task, folder)
    rows = [
        (args.module, f"{report.replaced_bytes:,}", f"{report.bytes:,}"),
        ("bytes on disk", f"{weight_bytes(weights_folder(args.model)):,}", f"{weight_bytes(folder):,}"),
        (task.metric, f"{before:.4f}", f"{after:.4f}"),
    ]
    return f"{report.table()}\n\n{format_table(('', 'before', 'after'), rows)}"


def _train(model: PreTrainedModel, task: Task, training: TrainingOptions, seed: int, folder: Path) -> None:
    """Straight-through training with the model as it was as teacher; in place."""
    from ..config import RMTKDConfig
    from ..trainer import RMTKDTrainer

    trainer = RMTKDTrainer(
        model=model,
        args=training_arguments(training, seed, folder, learning_rate=RATE),
        rmtkd_config=RMTKDConfig(schedule="none", hidden_weight=0.0, seed=seed),
        teacher_model=task.model,
        train_dataset=task.train,
        processing_class=task.processor,
        data_collator=task.collator,
    )
    train(trainer, training)
    model.to("cpu").eval()
