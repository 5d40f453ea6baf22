"""The cut itself: a narrow model built from its spec, its layers initialised from the teacher's through
projections."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from ..errors import RMTKDError
from ..modeling_rmtkd import TernaryMLP, epsilon_name, version_of
from ..models import Scratch, copied, rebuilt
from .bases import Projection, encoding, identity_projection
from .budget import site_widths
from .depth import list_of
from .norms import Norm, norm_of
from .sites import Anatomy, Unit, get_module, has_module, is_layer, unit_delta
from .weights import dense_table, dense_weight, scale_inputs, scale_outputs, set_weight


__all__ = ["Cuts", "build_student", "fold_norms", "initialise", "narrow_fields", "narrow_spec", "origin_of"]


class Cuts:
    """The projections of one surgery: {site: {unit path or "": Projection}}."""

    def __init__(self, projections: Mapping[str, Mapping[str, Projection]]):
        self.projections = dict(projections)

    def __contains__(self, site: str | None) -> bool:
        return site in self.projections

    def of(self, site: str | None, path: str) -> Projection | None:
        """The projection of a site as the unit at `path` sees it; None where the site is not cut."""
        found = self.projections.get(site)
        return None if found is None else found.get(path, found.get(""))

    def renamed(self, former: Mapping[str, str]) -> Cuts:
        """The same for a model of fewer blocks, {path of a block: what it was before}."""
        places = {old: new for new, old in former.items()}
        if all(old == new for old, new in places.items()):
            return self

        def name(path: str) -> str:
            block = next((old for old in places if path.startswith(f"{old}.")), None)
            return path if block is None else places[block] + path[len(block) :]

        return Cuts({s: {name(path): p for path, p in found.items()} for s, found in self.projections.items()})

    def with_whole(self, name: str, width: int) -> Cuts:
        """The same where a site of this width is written and read otherwise, though it is not cut."""
        return self if name in self else Cuts({**self.projections, name: {"": identity_projection(width)}})

    def encodings(self) -> Cuts:
        """The same for what is written alone: nothing can be initialised from them any more."""
        return Cuts({s: {path: encoding(p) for path, p in found.items()} for s, found in self.projections.items()})


def fold_norms(
    model: PreTrainedModel, anatomy: Anatomy, scratch: Scratch | None = None, turned: bool = True
) -> PreTrainedModel:
    """A copy of a pre-norm model whose stream can be rotated: same outputs, other weights, of decoders fp32 where they
    were narrower (so that they are rounded once, when all is done).

    Scales of norms go into the layers that read the stream through them, shifts too where all of those have a bias
    (Ashkboos et al. 2024, SliceGPT, section 3.2). Nothing is centred for layer norms: a cut keeps the all-ones
    direction and lays it along the new one, so that the narrow norm subtracts what the old one did.
    A norm before a layer that is tied to the word table keeps its own scale, and so does the last one of a model
    without a head, for what it gives is the model's output: there a rotation is not exact.
    Scales a feature behind a layer go into it. Post-norm models are given back as they are. What an encoder gives is
    an output, too: where it is not turned, its last norm stays as it is.

    Args:
        scratch: where the parameters of the copy are put. None: in memory, where those of `model` are.
        turned: the stream is cut.
    """
    if not anatomy.pre_norm:
        return model
    wide = anatomy.answers or anatomy.heads  # pixels come in the dtype of the model, ids in any

    def kept(parameter: nn.Parameter) -> nn.Parameter:
        dtype = torch.promote_types(parameter.dtype, torch.float32) if wide else parameter.dtype
        if scratch is None:
            return nn.Parameter(parameter.detach().to(dtype, copy=True), parameter.requires_grad)
        scratch.release()
        return nn.Parameter(scratch.keep(parameter, dtype), parameter.requires_grad)

    model = copied(model, {id(parameter): kept(parameter) for parameter in model.parameters()})
    if (anatomy.answers or anatomy.heads) and is_flash_attention_requested(model.config):
        model.config._attn_implementation = "sdpa"  # flash attention takes half precision alone
    present = [unit for unit in anatomy.units if is_layer(model, unit.path)]
    output = anatomy.last_norm if _is_bare(model, present) else None
    with torch.no_grad():
        for unit in present:
            norm, readers = norm_of(get_module(model, unit.path)), [u for u in present if u.through == unit.path]
            given = unit.block is None and any(u.block for u in readers) and not (turned and unit.writes)
            if norm is not None and readers and unit.path != output and not (given or any(u.tied for u in readers)):
                _fold_scale(norm, [get_module(model, reader.path) for reader in readers])
            if unit.scaled is not None:
                scale_outputs(get_module(model, unit.path), get_module(model, unit.scaled))
                get_module(model, unit.scaled).fill_(1.0)
            if scratch is not None:
                scratch.release()
    return model


def _is_bare(model: PreTrainedModel, present: list[Unit]) -> bool:
    """Whether what the last norm gives is the model's output: there is no head. Some classes with one have no backbone
    inside them."""
    outside = [unit for unit in present if unit.reads and unit.block is None and not unit.path.startswith("@.")]
    return model.base_model is model and not outside


def _fold_scale(norm: Norm, readers: list[nn.Module]) -> None:
    scale, shift = norm.scale, norm.shift
    foldable = shift is None or all(_takes_shift(reader) for reader in readers)
    if not foldable and bool((scale.abs() < 1e-8).any()):
        return  # a dead feature cannot be divided by; its norm keeps its scale and the refit does the rest
    for reader in readers:
        if shift is not None and foldable:
            weight = dense_weight(reader)
            added = torch.einsum("oi...,i->o...", weight, _repeated(shift, weight)).flatten()
            reader.bias.copy_(reader.bias.double() + added)
        scale_inputs(reader, scale)
    norm.set_scale(torch.ones_like(scale))
    if shift is not None:
        norm.module.bias.copy_(torch.zeros_like(shift) if foldable else shift / scale)


def _repeated(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(d,) once for each vector that a layer (out, copies * d) reads."""
    return values.repeat(weight.shape[1] // len(values))


def _takes_shift(reader: nn.Module) -> bool:
    """Whether a constant input can become part of the bias: there is one, and it sees all of the input everywhere."""
    if isinstance(reader, nn.Parameter):
        return False
    return reader.bias is not None and (reader.weight.dim() == 2 or reader.weight.shape[2:] == (1, 1))


def narrow_spec(model: PreTrainedModel, anatomy: Anatomy, couples: Mapping[str, int]) -> dict[str, Any]:
    """The spec of `model` narrowed to {couple: features of a group}, on top of the spec it may already have."""
    spec = copy.deepcopy((getattr(model.config, "rmtkd", None) or {}).get("spec", {}))
    if anatomy.kept and (path := list_of(anatomy)):
        spec["blocks"] = {path: {"kept": list(anatomy.kept[0]), "of": anatomy.kept[1]}}
    modules, parameters = spec.setdefault("modules", {}), spec.setdefault("parameters", {})
    base, attrs = spec.setdefault("base", {}), spec.setdefault("attrs", {})
    widths = site_widths(couples, anatomy)
    for unit in anatomy.units:
        _refuse_ternary(model, unit, widths)
        module = (
            get_module(model, unit.path) if is_layer(model, unit.path) else nn.Linear(1, 1)
        )  # a head of another task
        delta = unit_delta(unit, module, widths)
        if not delta:
            continue
        if (norm := norm_of(module)) is not None and anatomy.sites[unit.writes].kind == "hidden":
            # the same sum of squares is now divided by fewer features
            delta["eps"] = norm.eps * module.weight.numel() / delta["dim"]
            attrs.get(unit.path, {}).pop(epsilon_name(module), None)  # of an earlier cut
        target = parameters if isinstance(module, nn.Parameter) else modules
        entry = {**target.get(unit.path, {}), **delta}
        target[unit.path] = {key: value for key, value in entry.items() if value is not None}
    for attribute in anatomy.attributes:
        if attribute.site in widths:
            groups = anatomy.sites[attribute.site].groups
            value = attribute.value(widths[attribute.site], groups)
            attrs[attribute.path] = {
                **attrs.get(attribute.path, {}),
                **anatomy.fixed_attrs.get(attribute.path, {}),
                attribute.name: value,
            }
    for path, name in anatomy.heads.items():
        if name in widths:
            site, entry = anatomy.sites[name], spec.setdefault("heads", {})
            whole = entry.get(path, {}).get("of", site.group_width)
            entry[path] = {"kept": widths[name] // site.groups, "of": whole}
            entry[path] |= {"config": True} if anatomy.heads_in_config else {}
    for name, site in anatomy.config_fields.items():
        if site in widths:
            base.setdefault(name, getattr(model.config, name))
    return spec


def narrow_fields(anatomy: Anatomy, couples: Mapping[str, int]) -> dict[str, int]:
    """{field of the config: the width it states} of the narrowed model."""
    widths = site_widths(couples, anatomy)
    return {name: widths[site] for name, site in anatomy.config_fields.items() if site in widths}


def _refuse_ternary(model: PreTrainedModel, unit: Unit, widths: Mapping[str, int]) -> None:
    if not {unit.reads, unit.writes} & set(widths) or not has_module(model, unit.path):
        return
    if isinstance(get_module(model, unit.path), TernaryMLP):
        raise RMTKDError(
            f"{unit.path!r} is a ternary network, whose input and output widths are fixed; this cut would change "
            "them. Narrow first and replace the part afterwards, or restrict `sites` to others (for example "
            "intermediate)."
        )


def origin_of(name: str) -> str:
    """Name of the uncut model; of a folder its last part, for paths of somebody's machine do not belong on the Hub."""
    return Path(name).name if Path(name).exists() else name


def build_student(
    model: PreTrainedModel,
    anatomy: Anatomy,
    couples: Mapping[str, int],
    recipe: dict,
    provenance: dict,
    scratch: Scratch | None = None,
) -> PreTrainedModel:
    """The narrow architecture, in the dtype and on the device of `model`; what did not change is copied, the rest is
    still to be initialised. Its parameters lie in `scratch`, where there is one."""
    spec = narrow_spec(model, anatomy, couples)
    former = (getattr(model.config, "rmtkd", None) or {}).get("version", 1)  # what it needed, the result needs, too
    version = max(former, version_of(spec, decoder=bool(anatomy.heads or anatomy.stacks)))
    record = {"version": version, "spec": spec, "recipe": recipe, "provenance": provenance}
    return rebuilt(model, record, narrow_fields(anatomy, couples), scratch)


def initialise(
    student: nn.Module, teacher: nn.Module, anatomy: Anatomy, cuts: Cuts, scratch: Scratch | None = None
) -> None:
    """Fill every layer of the student that a cut touches: W' = encode_out.T @ W @ decode_in, and so on.

    Args:
        scratch: where the weights of both lie; None: in memory.

    Raises:
        RMTKDError: a layer of a changed shape that no cut accounts for: the family's declaration is incomplete.
    """
    touched = set()
    with torch.no_grad():
        for unit in anatomy.units:
            if not is_layer(teacher, unit.path):
                continue
            reads, writes = cuts.of(unit.reads, unit.path), cuts.of(unit.writes, unit.path)
            old, new = get_module(teacher, unit.path), get_module(student, unit.path)
            # a decoder tied to a table of full width stays one layer
            factor = cuts.of(unit.factor, unit.path) if hasattr(new, "up") else None
            if reads is None and writes is None and factor is None:
                continue
            if isinstance(new, nn.Parameter):
                change = (writes.encode if reads is None else reads.decode).to(old.device)
                new.copy_((old.double().movedim(unit.axis, -1) @ change).movedim(-1, unit.axis))
                touched.add(id(new))
                continue
            if reads is not None and unit.copies > 1:
                reads = Projection(*(torch.block_diag(*[m] * unit.copies) for m in (reads.encode, reads.decode)))
            _fill(new, old, reads, writes, factor)
            touched.update(id(p) for p in new.parameters())
            if scratch is not None:
                scratch.release()
        for unit in anatomy.units:
            if unit.scaled is not None:  # folded into the layer in front of it
                get_module(student, unit.scaled).fill_(1.0)
            reads = cuts.of(unit.reads, unit.path)
            if reads is not None and reads.offset is not None and is_layer(teacher, unit.path):
                _shift(student, unit, get_module(teacher, unit.path), reads, cuts.of(unit.writes, unit.path))
    shapes = {name: p.shape for name, p in teacher.named_parameters()}
    forgotten = [n for n, p in student.named_parameters() if id(p) not in touched and shapes.get(n) != p.shape]
    if forgotten:
        raise RMTKDError(
            f"{len(forgotten)} tensor(s) of the narrowed model were not initialised, the first is {forgotten[0]}: the "
            "declaration of this family names a site but not all layers that read or write it. Complete its layout."
        )


def _shift(student: nn.Module, unit: Unit, old: nn.Module, reads: Projection, writes: Projection | None) -> None:
    """What a reconstruction adds goes through a layer into its bias, or into the mean that the batch norm behind it
    subtracts; where there is neither, it is missing. Borders that a convolution fills with zeros get it all the same.
    """
    new = get_module(student, unit.path)
    if isinstance(new, nn.Parameter) or (new.bias is None and unit.norm is None):
        return
    weight = dense_weight(old)
    added = torch.einsum("oi...,i->o...", weight, reads.offset.to(weight.device)).reshape(len(weight), -1).sum(1)
    if writes is not None:
        added = writes.encode.to(added.device).T @ added if writes.index is None else added[writes.index]
    if new.bias is not None:
        new.bias.copy_(new.bias.double() + added)
    else:
        norm = get_module(student, unit.norm)
        if norm.running_mean is not None:  # else it subtracts the mean of what it gets
            norm.running_mean.copy_(norm.running_mean.double() - added)


def _fill(new: nn.Module, old: nn.Module, reads, writes, factor) -> None:
    device = old.weight.device if isinstance(old.weight, torch.Tensor) else "cpu"
    encode = writes.encode.to(device) if writes is not None else None
    decode = reads.decode.to(device) if reads is not None else None
    if isinstance(new, nn.Embedding):
        _fill_table(new, old, encode, factor)
    elif (norm := norm_of(old)) is not None:
        # The same sum of squares is divided by fewer features: the mean square is larger by d / k, so that normalised
        # features come out smaller by sqrt(k / d), where the scale is to be no other. Whole heads are as large as all.
        shrink = (len(encode) / encode.shape[1]) ** 0.5 if writes.index is None else 1.0
        scale = writes.scale
        if scale is None:
            scale = torch.einsum("dk,d,dk->k", encode, norm.scale, encode)
        scale = scale.to(device) * shrink
        dataclasses.replace(norm, module=new).set_scale(scale)
        if norm.shift is not None:
            new.bias.copy_(encode.T @ norm.shift)
    elif isinstance(new, nn.BatchNorm2d):
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(new, name) is not None:
                getattr(new, name).copy_(getattr(old, name)[writes.index])
    elif factor is not None and reads is None and writes is None:
        _fill_factors(new, old, factor)
    else:
        _fill_linear(new, old, encode, decode, None if writes is None else writes.index)


def _fill_table(new: nn.Embedding, old: nn.Embedding, encode: torch.Tensor | None, factor: Projection | None) -> None:
    if factor is not None:
        down, up = factor.encode.to(old.weight.device), factor.decode.to(old.weight.device)
        new.weight.copy_(dense_table(old) @ down)
        new.up.weight.copy_(up if encode is None else encode.T @ up)
    elif hasattr(new, "up"):
        new.weight.copy_(old.weight)
        new.up.weight.copy_(encode.T @ old.up.weight.double())
    else:
        new.weight.copy_(dense_table(old) @ encode)


def _fill_factors(new: nn.Module, old: nn.Module, factor: Projection) -> None:
    """W ~ decode (encode.T W): a factored layer, or a decoder whose second factor is the cut table it is tied to."""
    down, up = factor.encode.T.to(old.weight.device), factor.decode.to(old.weight.device)
    weight = dense_weight(old)
    if len(up) != weight.shape[0]:  # tied: the features are cut, not the vocabulary
        previous = (
            old.down.weight.double()
            if hasattr(old, "down")
            else torch.eye(len(up), dtype=down.dtype, device=down.device)
        )
        new.down.weight.copy_(down @ previous)
        if new.up.bias is not None:
            new.up.bias.copy_(old.bias)
        return
    new.down.weight.copy_((down @ weight.flatten(1)).reshape(new.down.weight.shape))
    new.up.weight.copy_(up.reshape(new.up.weight.shape))
    if new.bias is not None:
        kept = up @ (down @ old.bias.double())
        new.bias.copy_(kept if factor.offset is None else kept + factor.offset.to(kept.device))


def _fill_linear(
    new: nn.Module,
    old: nn.Module,
    encode: torch.Tensor | None,
    decode: torch.Tensor | None,
    index: torch.Tensor | None = None,
) -> None:
    """`index`: what `encode` selects, where it does."""
    if hasattr(new, "down"):  # stays factored: only the outer widths change
        up, down = old.up.weight.double(), old.down.weight.double()
        new.up.weight.copy_(up if encode is None else torch.einsum("or...,ok->kr...", up, encode))
        new.down.weight.copy_(down if decode is None else torch.einsum("ri...,ik->rk...", down, decode))
    elif getattr(old, "groups", 1) > 1 or (decode is not None and not decode.numel()):
        # whole groups of a convolution, of which a single one may be left: no reader that compensates
        set_weight(new, dense_weight(old)[index.to(old.weight.device)])
    else:
        weight = dense_weight(old)
        if index is not None:
            weight = weight[index.to(weight.device)]
        elif encode is not None:
            weight = torch.einsum("oi...,ok->ki...", weight, encode)
        set_weight(new, weight if decode is None else torch.einsum("oi...,ik->ok...", weight, decode))
    if new.bias is not None:
        bias = old.bias.double()
        new.bias.copy_(bias if encode is None else encode.T @ bias)
