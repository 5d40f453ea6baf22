"""Other ways to make a model small, each from its paper or its library, for `peers.py`.

`METHODS` names them. A method takes a `Given` and returns a model within its `limit`; `common` holds what they share.
They know BERT classifiers alone: enough for a comparison, no library.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

from transformers import PreTrainedModel

from . import dependency_pruning, fewer_layers, fisher_masks, from_scratch, int8, own, pca_slicing, whitened_factors
from .common import Given, OutOfReachError


__all__ = ["METHODS", "Given", "Method", "OutOfReachError", "code_lines"]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        make: makes the small model.
        title: what the table calls it.
        trim: the vocabulary is trimmed to the training texts first.
        distils: the loss of its training; False: plain fine-tuning on the labels.
        trains: it can be trained on (weights of 8 bits cannot).
        only_trained: without training it answers at random.
        sized: the size is a choice; False: it has one size alone.
        lines: that a user writes beyond loading and saving; None: nobody keeps a library for it, the lines of the
            module in this folder count.
        module: where it is implemented.
    """

    make: Callable[[Given], PreTrainedModel]
    title: str
    trim: bool = False
    distils: bool = True
    trains: bool = True
    only_trained: bool = False
    sized: bool = True
    lines: int | None = None
    module: ModuleType | None = None

    def code_lines(self) -> int:
        """Lines of code that a user writes or copies."""
        return self.lines if self.lines is not None else code_lines(inspect.getsource(self.module))


def code_lines(source: str) -> int:
    """Lines with code: no comment, no docstring, nothing empty."""
    texts = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    texts = [node for node in texts if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)]
    covered = {line for node in texts for line in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(map(str.strip, source.splitlines()), 1)
    return sum(bool(line) and not line.startswith("#") and number not in covered for number, line in lines)


taylor = partial(dependency_pruning.prune, importance="taylor")
group_norm = partial(dependency_pruning.prune, importance="group_norm")
native = partial(own.prune, shape="native")
cut_int8 = partial(int8.quantise, first=own.prune)
METHODS = {
    "ours": Method(own.prune, "ours, free widths", lines=2),
    "ours_native": Method(native, "ours, native shape", lines=2),
    "ours_trimmed": Method(own.prune, "vocabulary trimmed, then ours", trim=True, lines=3),
    "ours_trimmed_native": Method(native, "vocabulary trimmed, then ours, native shape", trim=True, lines=3),
    "vocabulary": Method(own.untouched, "vocabulary trimming alone", trim=True, sized=False, lines=1),
    "taylor": Method(taylor, "Torch-Pruning, Taylor", module=dependency_pruning),
    "taylor_fine_tuned": Method(
        taylor, "Torch-Pruning, Taylor, plain fine-tuning", distils=False, module=dependency_pruning
    ),
    "group_norm": Method(group_norm, "Torch-Pruning, group norm", module=dependency_pruning),
    "group_norm_fine_tuned": Method(
        group_norm, "Torch-Pruning, group norm, plain fine-tuning", distils=False, module=dependency_pruning
    ),
    "fisher_masks": Method(
        fisher_masks.prune, "Fisher masks of heads and neurons, table factorised", module=fisher_masks
    ),
    "fewer_layers": Method(fewer_layers.prune, "every second layer, table factorised", module=fewer_layers),
    "whitened_factors": Method(whitened_factors.prune, "whitened SVD factors", module=whitened_factors),
    "pca_slicing": Method(pca_slicing.prune, "PCA slicing", module=pca_slicing),
    "from_scratch": Method(from_scratch.build, "small model from scratch", only_trained=True, module=from_scratch),
    "int8": Method(int8.quantise, "int8 alone", trains=False, sized=False, lines=2),
    "ours_int8": Method(cut_int8, "ours, then int8", trains=False, lines=4),
}
