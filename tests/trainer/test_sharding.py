"""Sharded training without several processes: what is refused by name, and how checkpoints of any form are read.

The runs themselves: tests/distributed/test_sharded.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy

from optimum_rmtkd.distillation import AdaptiveOffPolicy
from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.reparameterization import MatrixProductOperator
from optimum_rmtkd.trainer.sharding_checks import check_sharding, check_sharding_arguments
from optimum_rmtkd.trainer.swap import complete_state, foreign_optimizer, load_optimizer
from optimum_rmtkd.trainer.swap.sharded import Blueprint, gathered

from .conftest import tiny_bert


def accelerator(kind="FSDP", parallelism=None, **plugin):
    values = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "cpu_offload": None} | plugin
    engine = SimpleNamespace(deepspeed_config={"zero_optimization": plugin}) if kind == "DEEPSPEED" else None
    state = SimpleNamespace(deepspeed_plugin=engine, fsdp_plugin=SimpleNamespace(**values) if kind == "FSDP" else None)
    distributed = SimpleNamespace(name=kind)
    return SimpleNamespace(state=state, distributed_type=distributed, parallelism_config=parallelism)


def checked(acc, args=None, model=None, how=None, transforms=()):
    check_sharding(acc, SimpleNamespace(**(args or {})), model or tiny_bert(), how, list(transforms))


def test_fsdp2_and_zero_are_accepted():
    checked(accelerator())
    checked(accelerator("DEEPSPEED", stage=3))
    checked(accelerator("MULTI_GPU"))


@pytest.mark.parametrize(
    ("acc", "given", "said"),
    [
        (accelerator("MULTI_CPU"), {"args": {"fsdp": True}}, "made MULTI_CPU of it"),
        (accelerator("MULTI_CPU"), {"args": {"deepspeed": True}}, "made MULTI_CPU"),
        (accelerator("DEEPSPEED", stage=0), {}, "stage=0; expected 1, 2 or 3"),
        (accelerator("DEEPSPEED", stage=3), {"args": {"torch_compile": True}}, "under DeepSpeed.*Set it False"),
        (accelerator("DEEPSPEED", stage=3), {"how": MatrixProductOperator()}, "reparameterization='mpo'.*use DDP"),
        (accelerator(fsdp_version=1), {}, r"fsdp \(version 1\) shards the parameters; it flattens"),
        (accelerator(parallelism="tensor"), {}, "parallelism_config"),
        (accelerator(cpu_ram_efficient_loading=True), {}, "cpu_ram_efficient_loading=True.*Set it False"),
        (accelerator(cpu_offload=CPUOffloadPolicy()), {}, "cpu_offload=True.*Set it False"),
        (accelerator(), {"args": {"torch_compile": True}}, "torch_compile=True.*Set it False"),
        (accelerator(), {"args": {"auto_find_batch_size": True}}, "auto_find_batch_size=True.*Set it False"),
        (accelerator(), {"how": MatrixProductOperator()}, "reparameterization='mpo'.*or use DDP"),
        (accelerator(), {"transforms": [AdaptiveOffPolicy()]}, "AdaptiveOffPolicy.*different lengths"),
        (accelerator(), {"model": torch.nn.Linear(2, 2)}, "Narrow the transformer first"),
    ],
)
def test_what_cannot_be_cut_sharded_is_refused_by_name(acc, given, said):
    with pytest.raises(RMTKDError, match=said):
        checked(acc, **given)


def test_a_model_in_shards_is_refused():
    model = tiny_bert()
    data = type("DTensor", (), {})()
    parameters = [SimpleNamespace(data=data)]
    model.parameters = lambda: iter(parameters)
    with pytest.raises(RMTKDError, match="lie in shards already"):
        checked(accelerator(), model=model)


def test_old_fsdp_is_refused_before_anything_is_built():
    for args, said in (
        ({"fsdp": True, "fsdp_plugin_args": None}, "FSDP of XLA"),
        ({"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 1}}, r"fsdp \(version 1\)"),
    ):
        with pytest.raises(RMTKDError, match=said):
            check_sharding_arguments(SimpleNamespace(**args))
    check_sharding_arguments(SimpleNamespace(fsdp=True, fsdp_plugin_args={"fsdp_version": 2}))


def trained(model, optimizer, steps=2):
    for step in range(steps):
        model(input_ids=torch.full((2, 4), 7 + step), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adam(model):
    """Two groups, whose order is not that of the model."""
    ones = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.AdamW(
        [{"params": ones, "weight_decay": 0.0}, {"params": [p for p in model.parameters() if p.dim() > 1]}]
    )


@pytest.mark.parametrize("by_name", [False, True])
def test_an_optimizer_is_read_by_number_and_by_name(tmp_path, by_name):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    optimizer = adam(model)
    trained(model, optimizer)
    state = optimizer.state_dict()
    if by_name:
        state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    torch.save(state, tmp_path / ("optimizer.bin" if by_name else "optimizer.pt"))
    assert foreign_optimizer(tmp_path, sharded=True) and foreign_optimizer(tmp_path, sharded=False) is by_name
    fresh = adam(model)
    load_optimizer(model, fresh, tmp_path)
    for parameter in model.parameters():
        for name, tensor in optimizer.state[parameter].items():
            assert torch.equal(fresh.state[parameter][name], tensor), name
    other = torch.optim.AdamW(model.parameters())
    if not by_name:
        with pytest.raises(RMTKDError, match="of another optimizer"):
            load_optimizer(model, other, tmp_path)


def test_a_state_is_completed_without_a_step():
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    twin = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ours, theirs = adam(model), adam(twin)
    complete_state(ours)
    assert all(not tensor.any() for values in ours.state.values() for tensor in values.values())
    assert len(ours.state) == len(list(model.parameters())) and all(p.grad is None for p in model.parameters())
    trained(model, ours)
    trained(twin, theirs)
    for (name, tensor), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_a_blueprint_holds_no_memory_and_gives_the_model_back():
    model = tiny_bert()
    model.bert.encoder.layer[0].attention.self.marked = "kept"
    model.classifier.weight.requires_grad_(False)
    model.classifier.weight.mark = "kept"
    blueprint = Blueprint(model)
    assert all(parameter.is_meta for parameter in blueprint.model.parameters())
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    twin = blueprint.filled(tensors)
    assert type(twin) is type(model) and twin.bert.encoder.layer[0].attention.self.marked == "kept"
    assert not twin.classifier.weight.requires_grad and twin.classifier.weight.mark == "kept"
    ids = torch.arange(10)[None]
    assert torch.equal(twin.eval()(ids).logits, model.eval()(ids).logits)


class Shard:
    """A tensor in shards that writes down when it is whole on the device, and when it leaves it."""

    def __init__(self, name: str, journal: list[str]):
        self.name, self.journal = name, journal

    def detach(self):
        return self

    def full_tensor(self):
        self.journal.append(f"{self.name} whole")
        return self

    def to(self, device):
        self.journal.append(f"{self.name} to {device}")
        return device


def test_tensors_leave_the_device_one_by_one():
    """All of them together may not fit there: that is why the model is sharded."""
    journal = []
    tensors = {name: Shard(name, journal) for name in "ab"}
    assert gathered(tensors, "cpu") == {"a": "cpu", "b": "cpu"}
    assert journal == ["a whole", "a to cpu", "b whole", "b to cpu"]
