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


__all__ = ["Group", "Observed", "Phase", "Shape", "phases"]

FP32, FP64 = 4, 8  # bytes
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
        priced: widths of the neurons that are priced by a factor of their moment (language models).
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
    """Bytes of one pass with gradients: what autograd keeps, the answers in fp32, and at the begin of the way back the
    exponentials of these, two gradients and their sum (`likelihood.log_likelihood`)."""
    return saved + 5 * FP32 * answers


def directions(shape: Shape) -> int:
    """Bytes while directions are found: of the stream all moments at once, unpacked (`directions.hidden_directions`);
    else of one site its moment, that seen through its reader, and two of `pivoted_cholesky`."""
    gradients = sum(p.gradient for p in shape.observed)
    stream = (shape.hidden_points + min(gradients, shape.hidden_points) + 6) * shape.hidden**2
    return FP64 * max([stream, *(4 * width**2 for width in shape.neurons)])


def factors(shape: Shape) -> int:
    """Bytes of what prices neurons: a Cholesky factor each, fp32, until all are priced (`_neuron_changes`)."""
    return FP32 * sum(width**2 for width in shape.priced)


def changes(shape: Shape) -> int:
    """Bytes of what each direction adds to the likelihood of each token of a batch, fp32, and of its square in fp64,
    summed up (`prices.directional_prices`)."""
    return 2 * FP32 * shape.batch * shape.length * (shape.hidden + sum(shape.priced)) if shape.directional else 0


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


def phases(shape: Shape) -> list[Phase]:
    """All phases of one cut, and of the training after it, in order. FLOPs are 2 a multiply-add."""
    models = {"source": shape.source} | ({"copy with folded norms": shape.folded} if shape.copied else {})
    sums, batch = moments(shape.observed, shape.rows), backward(shape.saved, shape.answers)
    per_token = FP32 * shape.batch * shape.length
    narrow = shape.kept * shape.flops
    found = [
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
                "changes of the likelihood": changes(shape),
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
                "one batch, forward and backward": backward(
                    round(shape.width_share * shape.trained), shape.answered_at_once
                ),
            },
            shape.distilled * (shape.flops + 3 * narrow),
        ),
        Phase("saving", {"teacher": shape.source, "student": round(shape.kept * shape.source)}, 0.0),
    ]
    return [Phase(p.name, {name: size for name, size in p.parts.items() if size}, p.flops) for p in found]
