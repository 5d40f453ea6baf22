"""Tiny random convolutional networks of every family, and the same functions in other units."""

from __future__ import annotations

import copy

import torch
import transformers as tf
from torch import nn

from optimum_rmtkd.surgery.sites import get_module, is_layer


SMALL = {"num_channels": 1, "num_labels": 3}
RESNET = SMALL | {"embedding_size": 8, "depths": [1, 2]}
REGNET = SMALL | {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2], "groups_width": 4}
CONVNEXT = SMALL | {"hidden_sizes": [8, 12], "depths": [1, 2], "num_stages": 2}

CONFIGS = {
    "resnet basic": tf.ResNetConfig(**RESNET, hidden_sizes=[8, 16], layer_type="basic"),
    "resnet bottleneck": tf.ResNetConfig(**RESNET, hidden_sizes=[16, 32], layer_type="bottleneck"),
    "resnet first stage": tf.ResNetConfig(
        **RESNET, hidden_sizes=[8, 16], layer_type="basic", downsample_in_first_stage=True
    ),
    "resnet in bottleneck": tf.ResNetConfig(
        **RESNET, hidden_sizes=[16, 32], layer_type="bottleneck", downsample_in_bottleneck=True
    ),
    "regnet x": tf.RegNetConfig(**REGNET, layer_type="x"),
    "regnet y": tf.RegNetConfig(**REGNET, layer_type="y"),
    "mobilenet v1": tf.MobileNetV1Config(**SMALL, depth_multiplier=0.05, min_depth=4),
    "mobilenet v2": tf.MobileNetV2Config(
        **SMALL,
        depth_multiplier=0.1,
        depth_divisible_by=4,
        min_depth=4,
        expand_ratio=2.0,
        output_stride=8,
        finegrained_output=False,
    ),
    "efficientnet": tf.EfficientNetConfig(
        **SMALL,
        width_coefficient=0.1,
        depth_coefficient=0.5,
        depth_divisor=4,
        hidden_dim=128,
        in_channels=[32, 16, 24, 40],
        out_channels=[16, 24, 40, 80],
        kernel_sizes=[3, 3, 5, 3],
        strides=[1, 1, 2, 1],
        num_block_repeats=[1, 2, 4, 3],
        expand_ratios=[1, 2, 2, 2],
    ),
    "convnext": tf.ConvNextConfig(**CONVNEXT),
    "convnext v2": tf.ConvNextV2Config(**CONVNEXT),
}
NAMES = tuple(CONFIGS)
HOMOGENEOUS = tuple(name for name in NAMES if name.startswith(("resnet", "regnet")))  # ReLU between their layers


def make(name: str, task: str = "ForImageClassification", seed: int = 0) -> tf.PreTrainedModel:
    """A random model through which signals go, whose norms and scales matter."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[name])
    model = getattr(tf, type(config).__name__.removesuffix("Config") + task)(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() in (2, 4) and "grn" not in key:
                nn.init.kaiming_normal_(parameter)
            elif "grn" in key:
                parameter.normal_(0, 0.5)
            elif "layer_scale" in key:
                parameter.uniform_(0.3, 0.8)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():  # statistics of the data: signals neither grow nor die on their way
        for norm in norms:
            norm.train().momentum = 1.0
        model(pixel_values=batches(1, 64, seed=7)[0]["pixel_values"])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def batches(count: int = 4, size: int = 16, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Images with some structure: few smooth patterns and noise."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.linspace(-3, 3, 32)
    found = []
    for _ in range(count):
        a, b, c = torch.randn(3, size, 1, 1, 1, generator=generator)
        waves = torch.sin(a * side + c) * torch.cos(b * side[:, None])
        found.append({"pixel_values": waves + torch.randn(size, 1, 32, 32, generator=generator)})
    return found


def outputs(model, batch) -> torch.Tensor:
    with torch.no_grad():
        found = model(**batch)
    return found.logits if "logits" in found else found.pooler_output


def _factors(count: int) -> torch.Tensor:
    return torch.exp(torch.randn(count).clamp(-1.5, 1.5))


def rescaled(model, anatomy, homogeneous: bool, seed: int = 5):
    """The same function: convolutions in other units than the batch norms behind them; and, where functions between
    layers are homogeneous, all channels in other units than what reads them."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for unit in anatomy.units:
            if unit.norm is not None:
                conv, norm = get_module(model, unit.path), get_module(model, unit.norm)
                c = _factors(conv.out_channels)
                variance = c.square() * (norm.running_var + norm.eps) - norm.eps
                c = torch.where(variance > 0, c, 1.0)  # what a variance cannot be
                conv.weight.mul_(c[:, None, None, None])
                norm.running_mean.mul_(c)
                norm.running_var.copy_(c.square() * (norm.running_var + norm.eps) - norm.eps)
        for site in anatomy.sites.values() if homogeneous else ():
            _rescale(model, anatomy, site, _factors(site.width))
        for stage in getattr(getattr(model.base_model, "encoder", None), "stages", ()):
            for layer in getattr(stage, "layers", ()):
                _rescale_convnext(layer)
    return model


def _rescale(model, anatomy, site, s: torch.Tensor) -> None:
    for unit in anatomy.units:
        if not is_layer(model, unit.path):
            continue
        module = get_module(model, unit.path)
        if unit.writes == site.name and isinstance(module, nn.BatchNorm2d):
            module.weight.mul_(s)
            module.bias.mul_(s)
        if unit.writes == site.name and site.name.endswith("squeeze"):
            module.weight.mul_(s[:, None, None, None])
            module.bias.mul_(s)
        if unit.reads == site.name:
            if getattr(module, "groups", 1) > 1:
                each = module.in_channels // module.groups
                rows = s.reshape(-1, each).repeat_interleave(module.out_channels // module.groups, 0)
                module.weight.div_(rows[:, :, None, None])
            else:
                module.weight.div_(s.reshape(1, -1, *[1] * (module.weight.dim() - 2)))


def _rescale_convnext(layer) -> None:
    if hasattr(layer, "pwconv1"):
        s = _factors(len(layer.layernorm.weight))
        layer.layernorm.weight.mul_(s)
        layer.layernorm.bias.mul_(s)
        layer.pwconv1.weight.div_(s)
    if getattr(layer, "layer_scale_parameter", None) is not None:
        s = _factors(len(layer.layer_scale_parameter))
        layer.layer_scale_parameter.mul_(s)
        layer.pwconv2.weight.div_(s[:, None])
        layer.pwconv2.bias.div_(s)
