"""DeepSpeed without DeepSpeed: what is refused by name. The runs themselves: tests/distributed/test_deepspeed.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.trainer.engine_checks import check_engine_config, check_written_by, partitions_in
from optimum_rmtkd.trainer.hooks.engines import EngineTrainerHost
from optimum_rmtkd.trainer.swap import built_whole, is_whole, made_whole, raw_optimizer, whole
from optimum_rmtkd.trainer.swap.sharded import Holder

from .conftest import tiny_bert


def config(stage=3, zero=(), **entries):
    return {"train_batch_size": 8, "zero_optimization": {"stage": stage, **dict(zero)}, **entries}


@pytest.mark.parametrize(
    "accepted",
    [
        config(1),
        config(2, {"overlap_comm": True, "reduce_bucket_size": 5e8, "offload_optimizer": {"device": "none"}}),
        config(3, {"stage3_param_persistence_threshold": 10, "sub_group_size": 1e9}, bf16={"enabled": True}),
        config(fp16={"enabled": False, "loss_scale": 0}, optimizer=None, steps_per_print=float("inf")),
        config(3, {"offload_param": {"device": "none", "nvme_path": None}}),
    ],
)
def test_plain_configurations_are_accepted(accepted):
    check_engine_config(accepted)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (config(0), "stage=0; expected 1, 2 or 3"),
        ({"bf16": {"enabled": True}}, "stage=0; expected 1, 2 or 3"),
        (config(optimizer={"type": "AdamW"}), "optimizer does not work.*Leave it out: optim, learning_rate"),
        (config(scheduler={"type": "WarmupLR"}), "scheduler does not work.*lr_scheduler_type"),
        (config(fp16={"enabled": True}), "fp16 does not work.*Take bf16, or fp32"),
        (config(3, {"offload_param": {"device": "nvme", "nvme_path": "/disk"}}), "zero_optimization.offload_param"),
        (config(2, {"offload_optimizer": {"device": "cpu"}}), "zero_optimization.offload_optimizer"),
        (config(3, {"zero_quantized_weights": True}), "zero_optimization.zero_quantized_weights"),
        (config(tensor_parallel={"autotp_size": 2}), "tensor_parallel does not work"),
        (config(checkpoint={"load_universal": True}), "checkpoint does not work"),
        (config(bf16={"enabled": True, "bf16_master_weights_and_grads": True}), "bf16.bf16_master_weights_and_grads"),
        (config(curriculum_learning={"enabled": True}, compression_training={"x": 1}), "curriculum_learning, compr"),
    ],
)
def test_what_is_not_known_to_work_is_refused_by_name(given, said):
    with pytest.raises(RMTKDError, match=said):
        check_engine_config(given)


def checkpoint(folder, processes, third=False, half=""):
    states = folder / "global_step4"
    states.mkdir(parents=True)
    for rank in range(processes):
        (states / f"{half}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
        if third:
            (states / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    if not third:
        (states / "mp_rank_00_model_states.pt").touch()
    return folder


@pytest.mark.parametrize("half", ["", "bf16_"])
def test_a_checkpoint_is_read_as_it_was_written(tmp_path, half):
    second, third = checkpoint(tmp_path / "2", 2, half=half), checkpoint(tmp_path / "3", 2, True, half)
    plain = tmp_path / "plain"
    plain.mkdir()
    for folder, stage in ((second, 1), (second, 2), (third, 3), (plain, None)):
        check_written_by(folder, stage, 2)
    for folder, stage, processes, said in (
        (second, 2, 4, r"written under DeepSpeed \(ZeRO-1 or 2\) with 2 processes, and .* under ZeRO-2 with 4"),
        (second, 3, 2, "ZeRO-1 or 2.*under ZeRO-3"),
        (third, 2, 2, r"\(ZeRO-3\).*under ZeRO-2"),
        (third, None, 2, r"\(ZeRO-3\) with 2 processes, and this run is without it"),
        (plain, 3, 2, r"written without DeepSpeed, and this run is under DeepSpeed \(ZeRO-3\)"),
    ):
        with pytest.raises(RMTKDError, match=said):
            check_written_by(folder, stage, processes)


def test_partitions_on_disks_of_two_machines_count_together(tmp_path):
    """Each machine has those of its own processes; none of them is another run's for that."""
    here, there = checkpoint(tmp_path / "here", 4), checkpoint(tmp_path / "there", 4)
    for folder, foreign in ((here, (2, 3)), (there, (0, 1))):
        for rank in foreign:
            (folder / "global_step4" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").unlink()
    together = partitions_in(here) | partitions_in(there)
    assert partitions_in(here) == {0, 1} and together == {0, 1, 2, 3}
    for folder in (here, there):
        check_written_by(folder, 2, 4, together)
        with pytest.raises(RMTKDError, match="with 4 processes, and this run is under ZeRO-2 with 2"):
            check_written_by(folder, 2, 2, together)
    with pytest.raises(RMTKDError, match=r"lacks the partitions of process\(es\) 0, 1 of at least 4"):
        check_written_by(there, 2, 4)


@pytest.mark.parametrize("name", ["optimizer", "lr_scheduler"])
def test_what_transformers_would_drop_is_refused(name):
    trainer = SimpleNamespace(optimizer=None, lr_scheduler=None, accelerator=None, model=tiny_bert())
    setattr(trainer, name, object())
    with pytest.raises(RMTKDError, match=f"optimizers= holds an {name}.*Leave it out"):
        EngineTrainerHost(trainer)


def test_plain_models_stay_as_they_are():
    model = tiny_bert()
    before = dict(model.named_parameters())
    assert is_whole(model) and whole(model) is model and made_whole(model) is model
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_a_held_model_is_copied_whole_from_what_its_holder_says():
    class Held(Holder):
        def holds(self, model):
            return held

        def tensors(self, model, device):
            return kept

        def size(self, model):
            return 0

    held, model = False, tiny_bert()
    kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    accelerator = type("Accelerator", (), {"device": torch.device("cpu")})()
    Held(accelerator).remember(model)
    assert whole(model) is model
    held = True
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    ids = torch.arange(10)[None]
    expected = tiny_bert()
    expected.load_state_dict(kept)
    assert not is_whole(model)
    assert torch.equal(whole(model).eval()(ids).logits, expected.eval()(ids).logits)


def test_models_are_built_whole_while_partitions_are_asked_for():
    from transformers.integrations import deepspeed as known

    class Asked:
        def is_zero3(self):
            return True

    asked = Asked()
    known.set_hf_deepspeed_config(asked)
    try:
        with built_whole():
            assert not known.is_deepspeed_zero3_enabled()
        assert known.is_deepspeed_zero3_enabled()
    finally:
        known.unset_hf_deepspeed_config()


def test_the_optimizer_is_found_inside_two_wrappers():
    adam = torch.optim.AdamW(tiny_bert().parameters())
    engines = type("Zero", (), {"optimizer": adam})()
    accelerates = type("Wrapper", (torch.optim.Optimizer,), {"__init__": lambda self: None, "optimizer": engines})()
    assert raw_optimizer(accelerates) is adam and raw_optimizer(engines) is adam and raw_optimizer(adam) is adam
