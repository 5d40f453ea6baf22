"""Folders of models that somebody spoiled on purpose: small functions that change a good one, by name."""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


FFN = "@.encoder.layer.0.intermediate.dense"
ATTENTION = "@.encoder.layer.0.attention.self"
NORM = "@.encoder.layer.0.output.LayerNorm"
DEEP = "[" * 400 + "]" * 400
Change = Callable[[Path], None]


def edited(change: Callable[[dict], None]) -> Change:
    """A folder whose config.json was changed."""

    def apply(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf8"))
        change(config)
        path.write_text(json.dumps(config), encoding="utf8")

    return apply


def with_fields(**fields: Any) -> Change:
    return edited(lambda config: config.update(fields))


def with_rmtkd(**entries: Any) -> Change:
    return edited(lambda config: config["rmtkd"].update(entries))


def with_spec(section: str, entries: Any) -> Change:
    """A section of the spec with these entries besides, or replaced where they are no object."""

    def change(config: dict) -> None:
        spec = config["rmtkd"]["spec"]
        spec[section] = {**spec.get(section, {}), **entries} if isinstance(entries, dict) else entries

    return edited(change)


def with_delta(path: str, **delta: Any) -> Change:
    return edited(lambda config: config["rmtkd"]["spec"]["modules"].setdefault(path, {}).update(delta))


def with_attributes(path: str, **attributes: Any) -> Change:
    return edited(lambda config: config["rmtkd"]["spec"]["attrs"].setdefault(path, {}).update(attributes))


def with_network(**options: Any) -> Change:
    return edited(lambda config: config["network"].update(options))


def with_part(**options: Any) -> Change:
    return edited(lambda config: next(iter(config["rmtkd"]["spec"]["ternary"].values())).update(options))


def with_file(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content) and None


def with_weights(change: Callable[[bytes], bytes]) -> Change:
    """A folder whose model.safetensors has other bytes."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return apply


def with_tensors(change: Callable[[dict], Any]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return apply


def with_header(change: Callable[[dict], Any]) -> Change:
    """The safetensors file with another header before the same bytes."""

    def bent(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        header = change(header) or header
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return with_weights(bent)


class _Touch:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/rmtkd_was_here"),))


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Touch()))


def only_a_harmless_pickle(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def in_shards(weight_map: Any = None, **index: Any) -> Change:
    """An index in the place of the file; by default its shard is missing."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = dict.fromkeys(tensors, "model-00001-of-00001.safetensors") if weight_map is None else weight_map
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": names} | index)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf8")

    return apply


def a_tensor(entry: Any) -> Change:
    return with_header(lambda header: header.update({"bert.pooler.dense.bias": entry}))


def of_layers(network: dict) -> None:
    network.update(hidden=[8] * 100_000, activations=[{"name": "relu"}] * 100_000)


STEPS = {"thresholds": [0.0], "levels": [0.0, 1.0], "slopes": [0.0, 1.0]}
# Sizes of which nothing may be allocated.
ABSURD: dict[str, tuple[str, Change]] = {
    "vocab_size 10^7": ("narrow", with_fields(vocab_size=10**7)),
    "vocab_size 10^12": ("narrow", with_fields(vocab_size=10**12)),
    "vocab_size 10^18": ("narrow", with_fields(vocab_size=10**18)),
    "vocab_size 10^7, no table": (
        "narrow",
        lambda folder: (
            (
                with_fields(vocab_size=10**7)(folder),
                with_tensors(lambda t: t.pop("bert.embeddings.word_embeddings.weight"))(folder),
            )
            and None
        ),
    ),
    "positions 10^8": ("narrow", with_fields(max_position_embeddings=10**8)),
    "token types 10^8": ("narrow", with_fields(type_vocab_size=10**8)),
    "labels 10^7": ("narrow", with_fields(num_labels=10**7, id2label=None, label2id=None)),
    "labels 10^5": ("narrow", with_fields(num_labels=10**5, id2label=None, label2id=None)),
    "layers 10^4": ("narrow", with_fields(num_hidden_layers=10**4)),
    "layers 10^6": ("narrow", with_fields(num_hidden_layers=10**6)),
    "layers 10^12": ("narrow", with_fields(num_hidden_layers=10**12)),
    "base 10^6": ("narrow", with_spec("base", {"hidden_size": 10**6})),
    "base 10^9": ("narrow", with_spec("base", {"hidden_size": 10**9})),
    "intermediate_size 10^8": ("narrow", with_fields(intermediate_size=10**8)),
    "rank 10^6": ("narrow", with_delta(FFN, rank=10**6)),
    "out 10^6": ("narrow", with_delta(FFN, out=10**6)),
    "in and base 10^6": (
        "narrow",
        lambda folder: (with_fields(hidden_size=10**6)(folder), with_spec("base", {})(folder)) and None,
    ),
    "ternary hidden 10^9": ("network", with_network(hidden=[10**9, 48])),
    "ternary hidden 10^9, last": ("network", with_network(hidden=[64, 10**9])),
    "ternary features 10^9": ("network", with_network(in_features=10**9)),
    "ternary labels 10^7": ("network", with_fields(num_labels=10**7, id2label=None, label2id=None)),
    "ternary 10^5 layers": ("network", edited(lambda config: of_layers(config["network"]))),
    "ternary thresholds 10^6": (
        "network",
        with_network(hidden=[8], activations=[STEPS | {"thresholds": [0.5] * 10**6, "levels": [0.5] * (10**6 + 1)}]),
    ),
    "ternary from a seed 10^9": ("seed", with_network(hidden=[10**9, 48])),
    "ternary part 10^9": ("part", with_part(hidden=[10**9])),
    "ternary part features 10^9": ("part", with_part(in_features=10**9)),
}

# What no JSON of ours says.
WRONG: dict[str, tuple[str, Change]] = {
    "rmtkd is a list": ("narrow", with_fields(rmtkd=[1])),
    "rmtkd is a word": ("narrow", with_fields(rmtkd="x")),
    "rmtkd with another entry": ("narrow", with_rmtkd(hooks={})),
    "version 5": ("narrow", with_rmtkd(version=5)),
    "version 0": ("narrow", with_rmtkd(version=0)),
    "version as a word": ("narrow", with_rmtkd(version="1")),
    "version true": ("narrow", with_rmtkd(version=True)),
    "version null": ("narrow", with_rmtkd(version=None)),
    "spec is null": ("narrow", with_rmtkd(spec=None)),
    "spec is a list": ("narrow", with_rmtkd(spec=[])),
    "spec with another section": ("narrow", with_spec("hooks", {})),
    "recipe is a word": ("narrow", with_rmtkd(recipe="x")),
    "provenance is a word": ("narrow", with_rmtkd(provenance="x")),
    "parameters_before is a word": ("narrow", with_rmtkd(provenance={"parameters_before": "many"})),
    "base_model is a list": ("narrow", with_rmtkd(provenance={"base_model": ["x"]})),
    "modules is a list": ("narrow", with_spec("modules", [1])),
    "modules is null": ("narrow", with_spec("modules", None)),
    "attrs is a word": ("narrow", with_spec("attrs", "x")),
    "base private": ("narrow", with_spec("base", {"_attn_implementation_internal": "evil/kernel"})),
    "base kernels": ("narrow", with_spec("base", {"_compatible_flash_implementations": ["evil/kernel"]})),
    "base dunder": ("narrow", with_spec("base", {"__class__": 1})),
    "base method": ("narrow", with_spec("base", {"to_dict": 40})),
    "base unknown": ("narrow", with_spec("base", {"no_such_field": 40})),
    "base word": ("narrow", with_spec("base", {"hidden_act": "relu"})),
    "base smaller": ("narrow", with_spec("base", {"hidden_size": 8})),
    "base negative": ("narrow", with_spec("base", {"hidden_size": -32})),
    "base a float": ("narrow", with_spec("base", {"hidden_size": 32.0})),
    "path to nothing": ("narrow", with_delta("@.nothing", out=4)),
    "path out of the folder": ("narrow", with_delta("../../etc/passwd", out=4)),
    "path of a homoglyph": ("narrow", with_delta("@.encоder.layer.0.intermediate.dense", out=4)),
    "path dunder": ("narrow", with_delta("__class__", out=4)),
    "path of a method": ("narrow", with_delta("forward", out=4)),
    "path empty": ("narrow", with_delta("", out=4)),
    "path of a container": ("narrow", with_delta("@.encoder", out=4)),
    "path twice": ("narrow", with_delta("bert.encoder.layer.0.intermediate.dense", out=24)),
    "path of dots": ("narrow", with_delta("@..encoder", out=4)),
    "parameter path to nothing": ("narrow", with_spec("parameters", {"@.nothing": {"dim": 4}})),
    "parameter axis zero": ("narrow", with_spec("parameters", {FFN + ".weight": {"dim": 4, "axis": 0}})),
    "parameter axis a float": ("narrow", with_spec("parameters", {FFN + ".weight": {"dim": 4, "axis": -2.0}})),
    "attrs path to nothing": ("narrow", with_attributes("@.nothing", scaling=0.5)),
    "ternary path to nothing": (
        "part",
        edited(lambda c: c["rmtkd"]["spec"]["ternary"].update({"@.nothing": {**_part_of(c)}})),
    ),
    "delta is a number": ("narrow", with_spec("modules", {FFN: 3})),
    "delta with another entry": ("narrow", with_delta(FFN, forward=3)),
    "delta of another kind": ("narrow", with_delta(FFN, dim=16)),
    "width zero": ("narrow", with_delta(FFN, out=0)),
    "width negative": ("narrow", with_delta(FFN, out=-24)),
    "width a float": ("narrow", with_delta(FFN, out=24.0)),
    "width a word": ("narrow", with_delta(FFN, out="24")),
    "width true": ("narrow", with_delta(FFN, out=True)),
    "width null": ("narrow", with_delta(FFN, out=None)),
    "width NaN": ("narrow", with_delta(FFN, out=math.nan)),
    "wider than the base": ("narrow", with_delta(FFN, out=68)),
    "other width": ("narrow", with_delta(FFN, out=20)),
    "norm without width": ("narrow", with_spec("modules", {NORM: {"eps": 1e-5}})),
    "eps NaN": ("narrow", with_delta(NORM, eps=math.nan)),
    "eps negative": ("narrow", with_delta(NORM, eps=-1e-5)),
    "eps infinite": ("narrow", with_delta(NORM, eps=math.inf)),
    "scaling NaN": ("narrow", with_attributes(ATTENTION, scaling=math.nan)),
    "scaling negative": ("narrow", with_attributes(ATTENTION, scaling=-0.3)),
    "scaling zero": ("narrow", with_attributes(ATTENTION, scaling=0)),
    "scaling a word": ("narrow", with_attributes(ATTENTION, scaling="0.3")),
    "scaling of 400 digits": ("narrow", with_attributes(ATTENTION, scaling=10**400)),
    "head size zero": ("narrow", with_attributes(ATTENTION, attention_head_size=0)),
    "head size larger": ("narrow", with_attributes(ATTENTION, attention_head_size=9)),
    "head sizes forgotten": ("narrow", with_spec("attrs", [])),
    "head sizes missing": ("narrow", edited(lambda config: config["rmtkd"]["spec"].update(attrs={}))),
    "head size of fewer": ("narrow", with_attributes(ATTENTION, attention_head_size=3, all_head_size=12)),
    "head size apart": ("narrow", with_attributes(ATTENTION, all_head_size=12)),
    "attribute _modules": ("narrow", with_attributes("@.encoder.layer", _modules={})),
    "attribute forward": ("narrow", with_attributes(ATTENTION, forward=1)),
    "attribute __class__": ("narrow", with_attributes(ATTENTION, __class__=1)),
    "attribute training": ("narrow", with_attributes(ATTENTION, training=True)),
    "attribute config": ("narrow", with_attributes(ATTENTION, config={})),
    "attribute of the root": ("narrow", with_attributes("", _keys_to_ignore_on_load_missing=[".*"])),
    "attribute it has not": ("narrow", with_attributes(FFN, scaling=0.5)),
    "hidden_act unknown": ("narrow", with_fields(hidden_act="swoosh")),
    "a method among the fields": ("narrow", with_fields(to_dict=1)),
    "a dunder among the fields": ("narrow", with_fields(__class__="dict")),
    "padding beyond the table": ("narrow", with_fields(pad_token_id=10**6)),
    "dtype of torch.load": ("narrow", with_fields(dtype="load")),
    "architectures a number": ("narrow", with_fields(architectures=5)),
    "no heads": ("narrow", with_fields(num_attention_heads=0)),
    "heads a word": ("narrow", with_fields(num_attention_heads="four")),
    "negative width": ("narrow", with_fields(intermediate_size=-64)),
    "rope_theta false": ("narrow", with_fields(rope_parameters={"rope_type": "default", "rope_theta": False})),
    "rope_theta NaN": ("narrow", with_fields(rope_parameters={"rope_type": "default", "rope_theta": math.nan})),
    "rope factor infinite": ("narrow", with_fields(rope_scaling={"rope_type": "linear", "factor": math.inf})),
    "padding of 400 digits": ("narrow", with_fields(pad_token_id=10**400)),
    "a field NaN": ("narrow", with_fields(initializer_range=math.nan)),
    "a field beyond 64 bits": ("narrow", with_fields(task_specific_params={"a": [2**64]})),
    "id2label of words": ("narrow", with_fields(id2label={"a": "b"})),
    "weights elsewhere": ("narrow", with_fields(transformers_weights="other.safetensors")),
    "other class": ("narrow", with_fields(architectures=["RMTKDViTForImageClassification"])),
    "class of no model": ("narrow", with_fields(architectures=["RMTKDTrainer"])),
    "class of words": ("narrow", with_fields(architectures=["import os"])),
    "network with a method": ("network", with_fields(save_pretrained=1)),
    "network missing": ("network", with_fields(network=None)),
    "network a list": ("network", with_fields(network=[1])),
    "network with another entry": ("network", with_network(forward=1)),
    "network hidden a word": ("network", with_network(hidden="wide")),
    "network hidden of words": ("network", with_network(hidden=["a", "b"])),
    "network hidden empty": ("network", with_network(hidden=[], activations=[])),
    "network activations too few": ("network", with_network(activations=[])),
    "network storage": ("network", with_network(storage="pickle")),
    "network storage a list": ("network", with_network(storage=["base3"])),
    "network sparsity 1": ("network", with_network(sparsity=1)),
    "network sparsity NaN": ("network", with_network(sparsity=math.nan)),
    "network seed a word": ("network", with_network(seed="x")),
    "network seed negative": ("network", with_network(seed=-1)),
    "network bias a word": ("network", with_network(bias="yes")),
    "activation unknown": ("network", with_network(activations=[{"name": "swoosh"}] * 2)),
    "activation a list": ("network", with_network(activations=[{"name": ["relu"]}] * 2)),
    "activation of both kinds": ("network", with_network(activations=[{"name": "relu", **STEPS}] * 2)),
    "activation mean NaN": ("network", with_network(activations=[{"name": "relu", "mean": math.nan}] * 2)),
    "steps without levels": ("network", with_network(activations=[{"thresholds": [0.0]}] * 2)),
    "steps that fall": (
        "network",
        with_network(activations=[STEPS | {"thresholds": [1.0, 0.0], "levels": [0, 1, 2]}] * 2),
    ),
    "steps NaN": ("network", with_network(activations=[STEPS | {"levels": [0.0, math.nan]}] * 2)),
    "another seed": ("seed", with_network(seed=3)),
    "part replaces a list": ("part", with_part(replaces=["Linear"])),
    "part replaces dunder": ("part", with_part(replaces="__class__")),
    "part replaces another class": ("part", with_part(replaces="Embedding")),
    "part storage": ("part", with_part(storage="torch.load")),
}

# Files that are not what they are named.
DAMAGED: dict[str, tuple[str, Change]] = {
    "weights cut short": ("narrow", with_weights(lambda content: content[:-50])),
    "weights cut in the header": ("narrow", with_weights(lambda content: content[:200])),
    "weights of 4 bytes": ("narrow", with_weights(lambda content: content[:4])),
    "weights empty": ("narrow", with_weights(lambda content: b"")),
    "weights longer": ("narrow", with_weights(lambda content: content + b"more")),
    "weights are text": ("narrow", with_weights(lambda content: b"these are no weights, and long enough to be some")),
    "weights are a pickle": ("narrow", with_weights(lambda content: pickle.dumps(_Touch()) + bytes(100))),
    "header of 10^9": ("narrow", with_weights(lambda content: struct.pack("<Q", 10**9) + content[8:])),
    "header of 2^63": ("narrow", with_weights(lambda content: struct.pack("<Q", 2**63) + content[8:])),
    "header no JSON": ("narrow", with_header(lambda header: b"{" * 400)),
    "header a list": ("narrow", with_header(lambda header: b"[1, 2, 3]")),
    "header deep": ("narrow", with_header(lambda header: b"[" * 100_000)),
    "header UTF-16": ("narrow", with_header(lambda header: json.dumps(header).encode("utf-16"))),
    "tensor a word": ("narrow", a_tensor("x")),
    "tensor without dtype": ("narrow", a_tensor({"shape": [20], "data_offsets": [0, 80]})),
    "tensor of a negative shape": ("narrow", a_tensor({"dtype": "F32", "shape": [-20], "data_offsets": [0, 80]})),
    "tensor of another shape": ("narrow", a_tensor({"dtype": "F32", "shape": [2**40], "data_offsets": [0, 80]})),
    "tensors overlap": ("narrow", a_tensor({"dtype": "F32", "shape": [20], "data_offsets": [0, 80]})),
    "tensor renamed": ("narrow", with_tensors(lambda t: t.update(evil=t.pop("bert.pooler.dense.bias")))),
    "tensor missing": ("narrow", with_tensors(lambda t: t.pop("bert.encoder.layer.0.output.dense.weight"))),
    "tensor misshapen": ("narrow", with_tensors(lambda t: t.update({"classifier.bias": torch.zeros(4)}))),
    "no tensors": ("narrow", with_tensors(lambda t: t.clear())),
    "no weights": ("narrow", lambda folder: (folder / "model.safetensors").unlink()),
    "a pickle": ("narrow", only_a_pickle),
    "a harmless pickle": ("narrow", only_a_harmless_pickle),
    "shard missing": ("narrow", in_shards()),
    "index a list": ("narrow", in_shards([1])),
    "index of numbers": ("narrow", in_shards({"a": 1})),
    "index out of the folder": ("narrow", in_shards({"a": "../model.safetensors"})),
    "index to a pickle": ("narrow", in_shards({"a": "pytorch_model.bin"})),
    "a distributed shard": ("narrow", with_file("shard-00000-model-00001-of-00001.safetensors", bytes(99))),
    "trits that are none": ("network", with_tensors(lambda t: t["mlp.layers.0.packed"].fill_(250))),
    "trits too few": (
        "network",
        with_tensors(lambda t: t.update({"mlp.layers.0.packed": t["mlp.layers.0.packed"][:-3].clone()})),
    ),
    "config is a list": ("narrow", with_file("config.json", b"[1, 2]")),
    "config is a number": ("narrow", with_file("config.json", b"1")),
    "config is empty": ("narrow", with_file("config.json", b"")),
    "config cut short": ("narrow", lambda f: with_file("config.json", (f / "config.json").read_bytes()[:-9])(f)),
    "config deep": ("narrow", with_file("config.json", b"[" * 100_000)),
    "config deep inside": ("narrow", with_fields(rmtkd=json.loads(DEEP))),
    "config UTF-16": (
        "narrow",
        lambda f: with_file("config.json", (f / "config.json").read_text().encode("utf-16"))(f),
    ),
    "config of another type": ("narrow", with_fields(model_type="rmtkd_nothing")),
    "config without a type": ("narrow", edited(lambda config: config.pop("model_type"))),
    "type is a list": ("narrow", with_fields(model_type=["rmtkd_bert"])),
}
ALL = ABSURD | WRONG | DAMAGED


def _part_of(config: dict) -> dict:
    return next(iter(config["rmtkd"]["spec"]["ternary"].values()))
