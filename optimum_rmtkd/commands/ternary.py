"""`optimum-cli rmtkd ternary`: ternary networks from features, or in place of a part of a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CalibrationError, RMTKDError
from ..ternary.config import TernaryConfig
from .base import Command, set_help
from .compress import TrainingOptions
from .data import DataArguments
from .options import add_options, from_options
from .output import format_table, weight_bytes, writing_beside


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from .task import Task


__all__ = ["TernaryCommand"]

USAGE = """optimum-cli rmtkd ternary --model MODEL --module PATH (--train-file FILE | --dataset NAME) -o OUT [options]
       optimum-cli rmtkd ternary --features FILE [--test-features FILE] -o OUT [options]"""

DESCRIPTION = """\
Replace a part of a fine-tuned model (a classifier head, a feed-forward network) by a fully-connected network whose hidden
weights are -1, 0 or 1, stored in 1.6 bits each; or fit such a network to given features. Random weights: only the readout
is fitted, nothing is trained. --weights trained: the part's own weights are rounded and trained on, with the model as
teacher. It makes files smaller, not inference faster.
"""

EPILOG = """\
examples:
  the feed-forward network of a block, its own weights rounded, trained for one epoch, packed
    optimum-cli rmtkd ternary --model ./my-distilbert --module distilbert.transformer.layer.0.ffn \\
        --train-file train.csv --validation-file dev.csv --weights trained --epochs 1 -o ./out
  the body narrowed by 40 %, then the head replaced: one run, one checkpoint
    optimum-cli rmtkd ternary --model ./my-bert --module classifier --train-file train.csv --target-reduction 0.4 -o ./out
  features of your own: arrays x (rows, features) and y (class of each row, or numbers) in one file
    optimum-cli rmtkd ternary --features train.npz --test-features test.npz --hidden 2000 2000 1000 -o ./head
  step activations with matched kernels; nothing stored but a seed
    optimum-cli rmtkd ternary --features train.npz --mode min_shift --levels 4 --storage seed -o ./head

reload:
  import optimum_rmtkd
  model = AutoModelForSequenceClassification.from_pretrained("./out")   # a model with a ternary part
  head = AutoModel.from_pretrained("./head")                            # head(features=x).logits

OUT appears only when everything has succeeded.
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
        parser.add_argument("--overwrite", action="store_true", help="Replace OUT if it holds something.")
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
        add_options(parser, TrainingOptions, "training (with --weights trained)", skip=("batch_size",))

    def execute(self) -> None:
        args = self.args
        config = from_options(TernaryConfig, args)
        if (args.model is None) == (args.features is None):
            raise RMTKDError("Expected either --model (with --module) or --features.")
        if args.model is not None and args.module is None:
            raise RMTKDError("--model needs --module, the part to replace, for example --module classifier.")
        with writing_beside(args.output, args.overwrite) as folder:
            if args.features is not None:
                table = _from_features(args.features, args.test_features, config, folder)
            else:
                data = from_options(DataArguments, args)
                training = dataclasses.replace(from_options(TrainingOptions, args), batch_size=args.batch_size)
                table = _in_a_model(args, data, training, config, folder)
        print(table)
        print(f"saved to {args.output}")


# -- features --------------------------------------------------------------------------------------------------------------


def _from_features(file: str, test_file: str | None, config: TernaryConfig, folder: Path) -> str:
    from ..ternary import compress_features

    x, y = _arrays(file)
    test = _arrays(test_file) if test_file else None
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
    except (OSError, ValueError, EOFError, AttributeError, SafetensorError) as error:
        raise RMTKDError(
            f"{file} cannot be read ({error}); expected .npz or .safetensors with arrays x and y."
        ) from error
    if not {"x", "y"} <= set(found):
        raise RMTKDError(
            f"{file} holds {', '.join(sorted(found)) or 'nothing'}; expected arrays x (rows, features) and y."
        )
    return found["x"], found["y"]


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
    if logits.shape[0] != len(y) or x.shape[0] == 0:
        raise CalibrationError(f"{len(x)} rows of features and {len(y)} of y: expected as many.")
    if y.is_floating_point():
        return float((logits - y.reshape(len(y), -1)).square().mean())
    return float((logits.argmax(1) == y).float().mean())


# -- a part of a model -------------------------------------------------------------------------------------------------


def _in_a_model(args, data: DataArguments, training: TrainingOptions, config: TernaryConfig, folder: Path) -> str:
    from ..config import RMTKDConfig
    from ..surgery import narrow
    from ..ternary import compress_head, pack_model
    from ..ternary.capture import find_part
    from .compress import _rounded_to, _save
    from .task import evaluate, load_task, stored_dtype, weights_folder

    recipe = RMTKDConfig(target_reduction=args.target_reduction, seed=config.seed)
    task = load_task(args.model, data, config.seed)
    find_part(task.model, args.module)  # a wrong path is refused before the first forward pass
    before, body = evaluate(task, task.model), task.model
    if args.target_reduction is not None:
        body = narrow(body, task.calibration_loader(args.batch_size, config.seed), recipe)
    model, report = compress_head(body, args.module, task.calibration_loader(args.batch_size, config.seed), config)
    if config.weights == "trained":
        if training.train:
            _train(model, task, training, config.seed, folder)
        model = pack_model(model, config.storage)
    dtype = stored_dtype(args.model)
    model = _rounded_to(model, dtype)
    after = evaluate(task, model)
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
    from ..trainer import RMTKDTrainer, RMTKDTrainingArguments

    RMTKDTrainer(
        model=model,
        args=RMTKDTrainingArguments(
            output_dir=str(folder / "trainer"),
            num_train_epochs=training.epochs,
            max_steps=training.max_steps,
            per_device_train_batch_size=training.batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            warmup_steps=training.warmup_steps,
            bf16=training.bf16,
            logging_steps=training.logging_steps,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            seed=seed,
        ),
        rmtkd_config=RMTKDConfig(schedule="none", hidden_weight=0.0, seed=seed),
        teacher_model=task.model,
        train_dataset=task.train,
        processing_class=task.processor,
        data_collator=task.collator,
    ).train()
    model.to("cpu").eval()
