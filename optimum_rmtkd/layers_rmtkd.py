"""The layers of narrowed and ternary models that torch does not have.

Lies beside `modeling_rmtkd.py` in every saved repository, and imports torch and transformers alone.
"""

import math
import warnings
import zlib

import torch
from torch import nn
from transformers.activations import ACT2FN

from .spec_rmtkd import ACTIVATIONS, SpecMismatchError


class LowRankLinear(nn.Module):
    """A linear layer of rank `rank` as two real `nn.Linear` children, which PEFT, torchao and FSDP see as what they
    are.

    Shapes: (..., in_features) -> (..., out_features).
    """

    def __init__(self, in_features, out_features, rank, bias=True):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    whole = False  # is `weight` the matrix that the factors stand for?

    @property
    def weight(self):
        # Code of transformers peeks at `.weight.dtype` and `.weight.device`; losses that are fused with the head
        # multiply by it, and ask for the whole.
        return self.up.weight @ self.down.weight if self.whole else self.up.weight

    @property
    def bias(self):
        return self.up.bias

    def forward(self, x):
        return self.up(self.down(x))


class LowRankConv2d(nn.Module):
    """A 1x1 convolution of rank `rank`: (batch, in, h, w) -> (batch, out, h', w'). The stride stays with the first
    factor."""

    def __init__(self, in_channels, out_channels, rank, stride=1, bias=True):
        super().__init__()
        self.in_channels, self.out_channels, self.rank, self.stride = in_channels, out_channels, rank, stride
        self.kernel_size, self.groups = (1, 1), 1
        self.down = nn.Conv2d(in_channels, rank, 1, stride=stride, bias=False)
        self.up = nn.Conv2d(rank, out_channels, 1, bias=bias)

    @property
    def weight(self):
        return self.up.weight

    @property
    def bias(self):
        return self.up.bias

    def forward(self, x):
        return self.up(self.down(x))


class LowRankEmbedding(nn.Embedding):
    """A table (num_embeddings, rank) followed by a projection (rank -> output_dim); ids (...) -> (..., output_dim).

    It stays an `nn.Embedding` of its short rows, `embedding_dim` is their width: `resize_token_embeddings` adds and
    drops rows, PEFT adapts and trains them (LoRA, `trainable_token_indices`) and merges what it learnt into them.
    """

    def __init__(self, num_embeddings, rank, output_dim, padding_idx=None):
        super().__init__(num_embeddings, rank, padding_idx=padding_idx)
        self.rank, self.output_dim = rank, output_dim
        self.up = nn.Linear(rank, output_dim, bias=False)

    def forward(self, input_ids):
        return self.up(super().forward(input_ids))

    @property
    def embed_scale(self):
        """What rows have to be multiplied by that did not come through `forward`: see `_Projection`."""
        return _Projection.of(self.up)

    def extra_repr(self):
        return f"{super().extra_repr()}, output_dim={self.output_dim}"


class _Projection(torch.Tensor):
    """A factor of one element, as PEFT knows them, that projects what it is multiplied with: rows * factor = up(rows).

    PEFT adds rows of its own to the output of a table, or looks them up in its place. It multiplies them by the
    table's `embed_scale`, because there are tables whose `forward` scales (Gemma's); ours projects. So LoRA and
    trainable tokens live in the short rows, where they can be merged without a residual.
    """

    @staticmethod
    def of(up):
        factor = torch.ones((), device=up.weight.device).as_subclass(_Projection)
        factor.up = up
        return factor

    def to(self, *args, **kwargs):
        return self

    def __rmul__(self, rows):
        return self.up(rows.to(self.up.weight.dtype)).to(rows.dtype)


def check_adapters(model):
    """Refuse PEFT's adapters of a factored table that add to its output without its `embed_scale` (DoRA, HiRA, ...).

    Where rows of the table are trained, its projection is not adapted besides (`target_modules="all-linear"` means it,
    too): PEFT does not unload an adapter inside another.

    Raises:
        ValueError: names the table and what can be adapted in its place.
    """
    for path, module in model.named_modules():
        if not isinstance(getattr(module, "base_layer", None), LowRankEmbedding):
            continue
        short = hasattr(module, "lora_embedding_A") or hasattr(module, "trainable_tokens_delta")
        if not short or getattr(module, "lora_magnitude_vector", None):
            raise ValueError(
                f"{path!r} is a table of short rows and a projection; PEFT's {type(module).__module__} with these "
                "options adapts tables whose output is as wide as their rows. LoRA without DoRA and "
                "trainable_token_indices work; or name the projection: "
                f"optimum_rmtkd.lora_targets(model, [{path.removesuffix('.token_adapter').rpartition('.')[2]!r}])."
            )
        table = module.base_layer
        if hasattr(table.up, "base_layer"):
            warnings.warn(f"{path}: its rows are trained, and its projection is left as it is.", stacklevel=2)
            table.up = table.up.base_layer


# -- ternary layers ---------------------------------------------------------------------------------------------------

PACKINGS = {"base3": (5, 3), "2bit": (4, 4)}  # storage -> (trits a byte, base); a digit is the trit + 1


def _wrapped(value):
    """A Python integer as the int64 with the same lowest 64 bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix(x):
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014) on int64 tensors, whose products wrap around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _wrapped(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def counter_bits(seed, stream, count):
    """(count,) int64: 64 pseudo-random bits for each counter. A function of its arguments alone, on every version of
    torch."""
    start = _mix(torch.tensor([_wrapped(seed)]) + _wrapped(stream * 0xD1342543DE82EF95))
    return _mix(start + torch.arange(1, count + 1) * _wrapped(0x9E3779B97F4A7C15))


def random_trits(shape, sparsity, seed, stream):
    """int8 tensor of `shape`: round((1 - sparsity) N / 2) entries 1, as many -1, the rest 0, in uniformly random
    places."""
    count = math.prod(shape)
    each = round((1 - sparsity) * count / 2)
    order = counter_bits(seed, stream, count).argsort(stable=True)
    trits = torch.zeros(count, dtype=torch.int8)
    trits[order[:each]] = 1
    trits[order[each : 2 * each]] = -1
    return trits.reshape(shape)


def packed_length(count, storage):
    """Bytes that `count` trits take."""
    return -(-count // PACKINGS[storage][0])


def pack_trits(trits, storage):
    """Trits, int8 of any shape -> bytes, uint8 (packed_length,): digits in little-endian order, padded with zero
    weights."""
    per_byte, base = PACKINGS[storage]
    digits = trits.reshape(-1) + 1
    padding = digits.new_ones(-len(digits) % per_byte)
    digits = torch.cat((digits, padding)).to(torch.uint8).reshape(-1, per_byte)
    powers = torch.tensor([base**k for k in range(per_byte)], dtype=torch.uint8, device=trits.device)
    return (digits * powers).sum(1, dtype=torch.uint8)


def unpack_trits(packed, shape, storage):
    """Inverse of `pack_trits`: int8 tensor of `shape`.

    Raises:
        SpecMismatchError: too few or too many bytes, or one that encodes no trits.
    """
    per_byte, base = PACKINGS[storage]
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (packed_length(count, storage),):
        raise SpecMismatchError(
            f"Packed weights of shape {tuple(packed.shape)}, {packed.dtype}: {count} trits stored as {storage} take "
            f"{packed_length(count, storage)} bytes (uint8). The file is truncated or belongs to other widths."
        )
    codes = torch.arange(256, device=packed.device)
    digits = torch.stack([codes // base**k % base for k in range(per_byte)], 1)
    valid = (digits < 3).all(1) & (codes < base**per_byte)
    index = packed.long()
    if not bool(valid[index].all()):
        at = int((~valid[index]).nonzero()[0])
        raise SpecMismatchError(
            f"Byte {at} of the packed weights is {int(packed[at])}, which encodes no {storage} trits: the file is "
            "damaged, or was packed otherwise than its config says."
        )
    return (digits - 1).to(torch.int8)[index].reshape(-1)[:count].reshape(shape)


class TernaryLinear(nn.Module):
    """A linear layer whose weights are -1, 0 or 1 times one scale. (..., in_features) -> (..., out_features).

    `storage` says what is kept, in memory and on disk: "base3" (5 trits a byte) and "2bit" (4) the packed trits;
    "seed" nothing but a checksum, the trits are drawn again; "latent" the real weights that training rounds,
    straight-through; "dense" real weights that nothing rounds, for comparison and as teacher. The first three compute
    with a dense matrix that is made at the first call and never saved.
    """

    def __init__(self, in_features, out_features, storage, sparsity, seed, stream, bias=False):
        super().__init__()
        self.in_features, self.out_features, self.storage = in_features, out_features, storage
        self.sparsity, self.seed, self.stream, self._dense = sparsity, seed, stream, None
        scale = torch.full((1,), 1 / math.sqrt((1 - sparsity) * in_features))
        if storage in ("latent", "dense"):
            self.latent = nn.Parameter(torch.randn(out_features, in_features) / math.sqrt(in_features))
        if storage == "latent":
            self.log_scale = nn.Parameter(scale.log())
            quantile = torch.special.erfinv(torch.full((1,), sparsity))  # of |N(0, 1 / in_features)| at `sparsity`
            self.register_buffer("threshold", math.sqrt(2 / in_features) * quantile)
        elif storage != "dense":
            self.register_buffer("scale", scale)
            if storage == "seed":
                self.register_buffer("checksum", torch.zeros(1, dtype=torch.int64))
            else:
                count = packed_length(in_features * out_features, storage)
                self.register_buffer("packed", torch.zeros(count, dtype=torch.uint8))
            if scale.device.type != "meta":
                self.store(self.drawn())
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_load_state_dict_post_hook(lambda module, _: module.forget())

    def forget(self):
        """Make the dense matrix anew when it is next needed."""
        self._dense = None

    def _apply(self, *args, **kwargs):
        self.forget()
        return super()._apply(*args, **kwargs)

    def drawn(self):
        """The random trits of this layer's seed: int8 (out_features, in_features)."""
        return random_trits((self.out_features, self.in_features), self.sparsity, self.seed, self.stream)

    def store(self, trits):
        """Keep these trits."""
        if self.storage == "seed":
            self.checksum.fill_(_checksum(trits))
        else:
            self.packed.copy_(pack_trits(trits, self.storage))
        self.forget()

    def trits(self):
        """int8 (out_features, in_features).

        Raises:
            SpecMismatchError: damaged storage.
        """
        if self.storage == "dense":
            raise ValueError("Dense weights are not ternary; round them first (optimum_rmtkd.ternary.ternarize).")
        if self.storage == "latent":
            return (
                (self.latent > self.threshold).to(torch.int8) - (self.latent < -self.threshold).to(torch.int8)
            ).detach()
        if self.storage != "seed":
            return unpack_trits(self.packed, (self.out_features, self.in_features), self.storage)
        trits = self.drawn()
        if _checksum(trits) != int(self.checksum):
            raise SpecMismatchError(
                f"The weights drawn from seed {self.seed} have checksum {_checksum(trits)}, the checkpoint says "
                f"{int(self.checksum)}: its config was changed, or it was made by another generator."
            )
        return trits.to(self.scale.device)

    @property
    def weight(self):
        """What the layer multiplies with: (out_features, in_features), in the dtype of the scale."""
        if self.storage == "dense":
            return self.latent
        if self.storage == "latent":
            rounded = self.trits().to(self.latent.dtype) * self.log_scale.exp()
            return rounded + (self.latent - self.latent.detach())
        if self._dense is None:
            with torch.inference_mode(False), torch.no_grad():
                dense = self.trits().to(self.scale.dtype) * self.scale
            if torch.compiler.is_compiling():
                return dense
            self._dense = dense
        return self._dense

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, storage={self.storage}"


def _checksum(trits):
    return zlib.crc32(pack_trits(trits.cpu(), "base3").numpy().tobytes())


class CentredActivation(nn.Module):
    """An activation less a constant; the same shape."""

    def __init__(self, name, mean=0.0):
        super().__init__()
        if name not in ACTIVATIONS and name not in ACT2FN:
            raise ValueError(
                f"Unknown activation {name!r}; expected one of {', '.join(sorted({*ACTIVATIONS, *ACT2FN}))}."
            )
        self.name, self.mean = name, mean
        self.function = ACTIVATIONS[name] if name in ACTIVATIONS else ACT2FN[name]

    def forward(self, x):
        out = self.function(x)
        if self.mean == 0:
            return out
        if out is x or out.requires_grad:
            return out - self.mean
        return out.sub_(self.mean)  # at large batches a second tensor would cost as much as the activation

    def options(self):
        """Arguments that make the same activation."""
        return {"name": self.name, "mean": self.mean}

    def extra_repr(self):
        return f"{self.name}, mean={self.mean:g}"


class StepActivation(nn.Module):
    """Piecewise constant, `levels[k]` up to `thresholds[k]`; the same shape. In the backward pass its derivative is
    `slopes[0]` for negative and `slopes[1]` for positive inputs: its own is zero."""

    def __init__(self, thresholds, levels, slopes=(0.0, 0.0)):
        super().__init__()
        self.thresholds, self.levels, self.slopes = tuple(thresholds), tuple(levels), tuple(slopes)

    def forward(self, x):
        value = self._steps(x.detach())
        if not (torch.is_grad_enabled() and x.requires_grad):
            return value
        smooth = self.slopes[0] * x + (self.slopes[1] - self.slopes[0]) * torch.relu(x)
        return value + (smooth - smooth.detach())

    def _steps(self, x):
        # comparisons that write floats: two vectorised passes a step, where torch.where and bucketize take many times
        # as long
        value = jump = None
        for threshold, below, above in zip(self.thresholds, self.levels, self.levels[1:]):
            if value is None:
                value = torch.gt(x, threshold, out=torch.empty_like(x)).mul_(above - below)
            else:
                jump = torch.empty_like(x) if jump is None else jump
                value.add_(torch.gt(x, threshold, out=jump), alpha=above - below)
        return value.add_(self.levels[0])

    def options(self):
        """Arguments that make the same activation."""
        return {"thresholds": list(self.thresholds), "levels": list(self.levels), "slopes": list(self.slopes)}

    def extra_repr(self):
        return f"thresholds={self.thresholds}, levels={self.levels}"


class TernaryMLP(nn.Module):
    """A fully-connected network with ternary hidden weights and a dense readout: (..., in_features) -> (...,
    out_features).

    h_0 = (x - input_mean) * input_factor, h_l = activation_l(W_l h_{l-1}), output = readout(h_L). The scales of W_l
    hold the 1 / sqrt(width) of the theory.

    `activations` has one dict a layer: {"name", "mean"} of `CentredActivation` or {"thresholds", "levels", "slopes"}
    of `StepActivation`.
    """

    def __init__(self, in_features, out_features, hidden, activations, storage, sparsity=0.5, seed=0, bias=False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("input_mean", torch.zeros(in_features))
        self.register_buffer("input_factor", torch.ones(in_features))
        self.layers, self.activations = nn.ModuleList(), nn.ModuleList()
        width = in_features
        for stream, (features, options) in enumerate(zip(hidden, activations, strict=True)):
            self.layers.append(TernaryLinear(width, features, storage, sparsity, seed, stream, bias))
            self.activations.append((CentredActivation if "name" in options else StepActivation)(**options))
            width = features
        self.readout = nn.Linear(width, out_features)

    def hidden_features(self, x):
        """Output of the last hidden layer, (..., hidden[-1])."""
        x = (x - self.input_mean) * self.input_factor
        for layer, activation in zip(self.layers, self.activations):
            x = activation(layer(x))
        return x

    def forward(self, x):
        return self.readout(self.hidden_features(x))


def check_ternary(model):
    """Unpack every ternary layer now, so that a damaged file is refused when it is read and not when it is first used.

    Raises:
        SpecMismatchError: damaged storage.
    """
    for module in model.modules():
        if isinstance(module, TernaryLinear) and not any(b.is_meta for b in module.buffers()):
            module.weight  # noqa: B018
