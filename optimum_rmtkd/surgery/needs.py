"""What a surgery needs in memory and work, by formula: numbers of a model in, bytes and FLOPs out. No tensor is made.

Each formula says which code it describes; where that code changes, its formula does. What processes hold before any of
it (torch, transformers) is not counted, nor what allocators round up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..batches.storing import HELD
from ..spectra.autocorrelation import MAX_LAG, PROJECTIONS
from ..spectra.products import packed_size
from .likelihood import DRAWN_AT_ONCE


__all__ = ["Group", "Observed", "Phase", "Shape", "phases"]

FP32, FP64 = 4, 8  # bytes
SHARD = 10**9  # bytes, of one file of weights
MODELS = ("source", "copy with folded norms", "student")  # parts that are whole models
OPTIMIZER = 12  # bytes a weight: its gradient and AdamW's two means, in fp32


@dataclass(frozen=True)
class Observed:
    """A place whose moments calibration takes; `gradient`: those of the loss gradient, too."""

    width: int
    gradient: bool = False


@dataclass(frozen=True)
class Group:
    """Layers of one block that are fitted together: all read `reads` features, and each writes one of `writes`."""

    reads: int
    writes: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """The numbers of one model and one set of calibration data that the formulas read.

    Attributes:
        parameters: of the model; `kept`: the share of them that stays.
        element: bytes of a weight.
        copied: bytes of a weight of the copy whose norms are folded; 0: there is none.
        observed: all places that are observed.
        hidden: width of the stream; 0: the model has none. `hidden_points`: places where it is observed.
        neurons: width of each site whose features are selected (feed-forward parts, whole heads, channels).
        priced: widths of the neurons that are priced by a factor of their moment (language models); of channels twice
            for each of their readers, for their factors are fp64.
        heads: features of each site that is cut inside its heads, once for each of its projections.
        blocks: groups of each residual block (the largest of these counts).
        width_share: share of each width that stays, where all are cut alike.
        samples, length, batch: of the calibration data.
        saved: bytes that one batch keeps for its backward pass; `trained`: with gradients of the weights.
        inside: largest sum of what the layers of one block put out, features a token.
        answers: numbers that the model puts out for a batch (logits); `answered_at_once`: so many in training, where
            those of a language model are made a few tokens at a time.
        flops: of a forward pass over one sample.
        refitted: samples of the refit; `directional`: samples of the directional prices, 0 without.
        rows: positions of a sample whose activations go into moments.
        inside_blocks, largest_block: parameters of all residual blocks, and of the largest.
        distilled: samples of the training after the cut, all epochs together.
    """

    parameters: int
    kept: float
    element: int
    copied: int
    observed: tuple[Observed, ...]
    hidden: int
    hidden_points: int
    neurons: tuple[int, ...]
    priced: tuple[int, ...]
    heads: tuple[int, ...]
    blocks: tuple[tuple[Group, ...], ...]
    width_share: float
    samples: int
    length: int
    batch: int
    saved: int
    trained: int
    inside: int
    answers: int
    answered_at_once: int
    flops: float
    refitted: int
    directional: int
    rows: int
    inside_blocks: int = 0
    largest_block: int = 0
    distilled: int = 0

    @property
    def source(self) -> int:
        """Bytes of the model as it is given."""
        return self.parameters * self.element

    @property
    def folded(self) -> int:
        """Bytes of the copy with folded norms (`narrowing.fold_norms`)."""
        return self.parameters * self.copied

    @property
    def student(self) -> int:
        """Bytes of the narrow model before it gets the number format of the source (`narrowing.build_student`)."""
        return round(self.kept * self.parameters * (self.copied or self.element))


@dataclass(frozen=True)
class Phase:
    """What one phase holds at its peak, by part, and its FLOPs."""

    name: str
    parts: Mapping[str, int]
    flops: float

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """The part that takes the most."""
        return max(self.parts, key=self.parts.__getitem__)


def moments(observed: tuple[Observed, ...], length: int) -> int:
    """Bytes of all `SecondMoments`: upper triangles in fp64, of the gradient one more, and lagged sums."""
    lags = min(MAX_LAG + 1, length)
    return sum(FP64 * (packed_size(p.width) * (1 + p.gradient) + lags * p.width * (PROJECTIONS + 1)) for p in observed)


def backward(saved: int, answers: int) -> int:
    """Bytes of one pass with gradients: what autograd keeps, the answers in fp32 and their gradient, and the
    probabilities of those that are drawn at once (`likelihood.log_likelihood`)."""
    return saved + 2 * FP32 * answers + (2 * FP64 + FP32) * min(answers, DRAWN_AT_ONCE)


def training(saved: int, answers: int) -> int:
    """Bytes of one pass of a training: as torch makes the gradient of a cross-entropy, in five matrices of answers."""
    return saved + 5 * FP32 * answers


def directions(shape: Shape) -> int:
    """Bytes while directions are found: of the stream the mean of its moments and of their gradients, one of each, and
    what an eigendecomposition takes (`directions.hidden_directions`); else of one site its moment, that seen through
    its reader, and two of `pivoted_cholesky`."""
    return FP64 * max([10 * shape.hidden**2, *(4 * width**2 for width in shape.neurons)])


def factors(shape: Shape) -> int:
    """Bytes of what prices neurons and channels: a Cholesky factor each, fp32, until all are priced
    (`directions._neuron_changes`, `channels.channel_directions`)."""
    return FP32 * sum(width**2 for width in shape.priced)


def changes(shape: Shape) -> int:
    """Bytes of what each direction adds to the likelihood of each token of a batch: of the stream fp32, summed over
    places; of one site at a time fp32, and twice as fp64 while its squares are summed up (`prices._pass`)."""
    widest = max([shape.hidden, *shape.priced], default=0)
    per_token = FP32 * shape.hidden + (FP32 + 2 * FP64) * widest
    return shape.batch * shape.length * per_token if shape.directional else 0


def waiting(shape: Shape) -> int:
    """Bytes of the activations that wait for their gradients to be priced, fp32."""
    if not (shape.directional and shape.hidden):
        return 0
    return FP32 * shape.batch * shape.length * sum(p.width for p in shape.observed)


def projections(shape: Shape) -> int:
    """Bytes of all cuts, fp64: (width, kept) to decode neurons, twice that of the stream; of heads block-diagonal
    matrices of all of them, to encode and to decode (`bases.Projection`)."""
    share = shape.width_share
    return round(FP64 * share * (sum(w * w for w in shape.neurons) + 2 * shape.hidden**2 + _heads(shape)))


def encodings(shape: Shape) -> int:
    """Bytes of what of the cuts the refit reads (`Cuts.encodings`)."""
    return round(FP64 * shape.width_share * (shape.hidden**2 + _heads(shape) / 2))


def _heads(shape: Shape) -> int:
    return 2 * sum(width**2 for width in shape.heads)


def regression(group: Group, share: float, rows: int) -> int:
    """Bytes of fitting one group (`leastsquares.LeastSquares`): its sums, a solution (the gram unpacked, scaled,
    with a ridge, its factor; right-hand sides), and the rows of one batch in fp32."""
    reads, writes = round(share * group.reads), [round(share * width) for width in group.writes]
    sums = packed_size(reads) + reads * sum(writes)
    solution = 5 * reads**2 + 3 * reads * max(writes, default=0)
    return FP64 * (sums + solution) + FP32 * rows * (2 * reads + 3 * sum(writes))


def refitting(shape: Shape) -> int:
    """Bytes of the largest group of all blocks, beside stores that hold up to HELD bytes each in memory."""
    rows = shape.batch * shape.length
    largest = max((regression(g, shape.width_share, rows) for block in shape.blocks for g in block), default=0)
    stores = max((len(block) for block in shape.blocks), default=0) + 6
    return largest + HELD * stores


def products(shape: Shape) -> float:
    """FLOPs of the moments: of activations at `rows` places of a sample, of gradients at all."""
    each = [
        shape.rows * packed_size(p.width) + p.gradient * shape.length * packed_size(p.width) for p in shape.observed
    ]
    return 2.0 * shape.samples * sum(each)


def decompositions(shape: Shape) -> float:
    """FLOPs of directions: pivoted Cholesky 2/3 m^3 as it is done, two eigendecompositions of 9 d^3, and four products
    of 2 d^3 for each place of the stream."""
    stream = (18 + 8 * shape.hidden_points) * shape.hidden**3
    return float(stream + sum(2 * width**3 / 3 for width in shape.neurons))


def fits(shape: Shape) -> float:
    """FLOPs of all regressions: grams, right-hand sides and the layer's own answers over the rows; one solution."""
    total, rows = 0.0, shape.refitted * shape.length
    for group in (g for block in shape.blocks for g in block):
        reads, writes = shape.width_share * group.reads, shape.width_share * sum(group.writes)
        total += rows * (reads**2 + 4 * reads * writes) + reads**3 / 3 + 2 * reads**2 * writes
    return total


def phases(shape: Shape, streamed: bool = False) -> list[Phase]:
    """All phases of one cut, and of the training after it, in order. FLOPs are 2 a multiply-add.

    Args:
        streamed: of `narrow_streamed`, or of `narrow` with `scratch`, after which nothing is trained.
    """
    found = _streamed(shape) if streamed else _in_memory(shape)
    return [Phase(p.name, {name: size for name, size in p.parts.items() if size}, p.flops) for p in found]


def _streamed(shape: Shape) -> list[Phase]:
    """What lies in files is held while a block runs (`models.Scratch.release`): its weights, the sums that are taken
    in it; of the backward pass its own activations, and what goes into each other one (`recomputing.recomputed`)."""
    count, per_token = max(1, len(shape.blocks)), FP32 * shape.batch * shape.length
    wide, whole = shape.copied or shape.element, {p.name: p for p in _in_memory(shape)}
    tables = {"tables and head": (shape.parameters - shape.inside_blocks) * wide}
    block = {"weights of one block": shape.largest_block * wide}
    sums = moments(shape.observed, shape.rows) // count
    sums += FP32 * max((packed_size(p.width) for p in shape.observed), default=0)
    batch = backward(shape.saved // count, shape.answers) + per_token * shape.hidden * count
    of_one = {
        "factors that price neurons": factors(shape) // count,
        "directions": directions(shape),
        "changes of the likelihood": changes(shape) + waiting(shape) // count,
    }
    cut = {"projection of one site": FP64 * 4 * max((width**2 for width in shape.neurons), default=0)}
    refit = {name: size for name, size in whole["refit"].parts.items() if name not in MODELS}
    passes = {"one batch, forward and backward": batch}
    again = {"calibration": shape.samples * shape.flops, "planning": shape.directional * shape.flops}
    parts = {
        "calibration": {**tables, **block, "moments": sums, **passes},
        "planning": {**tables, **block, **of_one, **(passes if shape.directional else {})},
        "cutting": {**block, **cut},
        "refit": {**tables, **block, **refit},
        "saving": {"one shard": min(SHARD, round(shape.kept * shape.source))},
    }
    return [Phase(name, held, whole[name].flops + again.get(name, 0.0)) for name, held in parts.items()]


def _in_memory(shape: Shape) -> list[Phase]:
    models = {"source": shape.source} | ({"copy with folded norms": shape.folded} if shape.copied else {})
    sums, batch = moments(shape.observed, shape.rows), backward(shape.saved, shape.answers)
    per_token = FP32 * shape.batch * shape.length
    narrow = shape.kept * shape.flops
    return [
        Phase(
            "calibration",
            {**models, "moments": sums, "one batch, forward and backward": batch},
            2 * shape.samples * shape.flops + products(shape),
        ),
        Phase(
            "planning",
            {
                **models,
                "moments": sums,
                "factors that price neurons": factors(shape),
                "directions": directions(shape),
                "changes of the likelihood": changes(shape) + waiting(shape),
                "one batch, forward and backward": batch if shape.directional else 0,
            },
            2 * shape.directional * shape.flops + decompositions(shape),
        ),
        Phase(
            "cutting",
            {**models, "student": shape.student, "projections": projections(shape)},
            2 * shape.width_share * sum(width**3 for width in shape.neurons),
        ),
        Phase(
            "refit",
            {
                **models,
                "student": shape.student,
                "encodings": encodings(shape),
                "regression of the largest group": refitting(shape),
                "one batch of one block": 2 * per_token * shape.inside,
            },
            shape.refitted * (shape.flops + narrow) + fits(shape),
        ),
        Phase(
            "distillation",
            {
                "teacher": shape.source,
                "student": shape.student,
                "gradients and optimizer": round(OPTIMIZER * shape.kept * shape.parameters),
                "one batch, forward and backward": training(
                    round(shape.width_share * shape.trained), shape.answered_at_once
                ),
            },
            shape.distilled * (shape.flops + 3 * narrow),
        ),
        Phase("saving", {"teacher": shape.source, "student": round(shape.kept * shape.source)}, 0.0),
    ]
