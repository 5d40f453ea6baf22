"""Tiny random models of every family and task head, and data for them."""

from __future__ import annotations

import copy

import torch
import transformers as tf

from ..tables import some_slow


TEXT = {"vocab_size": 61, "max_position_embeddings": 40, "num_labels": 3}
BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
VISION = BODY | {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 3}
CONV = {"num_channels": 1, "embedding_size": 16, "num_labels": 3, "depths": [1, 2], "hidden_sizes": [16, 32]}

CONFIGS = {
    "bert": tf.BertConfig(**TEXT, **BODY),
    "roberta": tf.RobertaConfig(**TEXT, **BODY),
    "xlm-roberta": tf.XLMRobertaConfig(**TEXT, **BODY),
    "camembert": tf.CamembertConfig(**TEXT, **BODY),
    "distilbert": tf.DistilBertConfig(**TEXT, **DISTIL),
    "electra": tf.ElectraConfig(**TEXT, **BODY, embedding_size=32),
    "electra-projected": tf.ElectraConfig(**TEXT, **BODY, embedding_size=16),
    "vit": tf.ViTConfig(**VISION),
    "deit": tf.DeiTConfig(**VISION),
    "resnet-basic": tf.ResNetConfig(**CONV, layer_type="basic"),
    "resnet-bottleneck": tf.ResNetConfig(**CONV | {"hidden_sizes": [32, 64]}, layer_type="bottleneck"),
}
TEXT_TASKS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
IMAGE_TASKS = ("Model", "ForImageClassification")


def stem(name: str) -> str:
    """ "electra-projected" -> "Electra"."""
    return type(CONFIGS[name]).__name__.removesuffix("Config")


def is_image(name: str) -> bool:
    """Whether the family reads pixels."""
    return hasattr(CONFIGS[name], "num_channels")


def tasks_of(name: str) -> tuple[str, ...]:
    """Heads of transformers that the family has."""
    return IMAGE_TASKS if is_image(name) else TEXT_TASKS


ALL = [(name, task) for name in CONFIGS for task in tasks_of(name)]
# of the families whose layers are like another one's, one task is quick
ALIKE = {"roberta": "ForQuestionAnswering", "xlm-roberta": "ForMaskedLM", "camembert": "ForTokenClassification"}
ALIKE |= {"electra-projected": "Model", "deit": "ForImageClassification", "resnet-bottleneck": "Model"}
SOME_SLOW = some_slow(ALL, [(name, task) for name, task in ALL if ALIKE.get(name, task) == task])
CLASSIFIERS = [(name, "ForImageClassification" if is_image(name) else "ForSequenceClassification") for name in CONFIGS]


def make(name: str, task: str, seed: int = 0) -> tf.PreTrainedModel:
    """A random model whose layers matter: at transformers' own scale of 0.02 all logits would be alike."""
    torch.manual_seed(seed)
    config = CONFIGS[name].__class__(**CONFIGS[name].to_dict())
    if task == "ForQuestionAnswering":
        config.num_labels = 2
    model = getattr(tf, stem(name) + task)(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not is_image(name) or "resnet" not in name:
                parameter.mul_(4.0) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 1.5)
    return model


def batches(name: str, count: int = 6, size: int = 8, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Calibration batches, half of the texts padded."""
    generator = torch.Generator().manual_seed(seed)
    if is_image(name):
        side = 8 if "resnet" not in name else 32
        return [{"pixel_values": torch.randn(size, 1, side, side, generator=generator)} for _ in range(count)]
    made = []
    for _ in range(count):
        ids = torch.randint(5, 61, (size, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[::2, 9:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def outputs(model, batch) -> torch.Tensor:
    """The first tensor a model returns (or both of a span's), at unmasked positions."""
    with torch.no_grad():
        result = model(**batch)
    found = torch.stack(result[:2], -1) if "start_logits" in result else result[0]
    mask = batch.get("attention_mask")
    return found[mask.bool()] if mask is not None and found.shape[:2] == mask.shape else found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to the order of sums, which is not that of another process (threads), or of weights that were read from
    a file (they lie at other addresses, where vectorised kernels begin elsewhere)."""
    tolerance = 1e-5 if found.dtype in (torch.float32, torch.float64) else 1e-2
    alike = found.shape == expected.shape and found.dtype == expected.dtype
    return alike and torch.allclose(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def same(loaded, saved, batch) -> bool:
    """Outputs up to the order of sums, and what both hold under one name bit for bit."""
    ours, theirs = loaded.state_dict(), saved.state_dict()
    held = all(torch.equal(ours[name], theirs[name]) for name in ours.keys() & theirs.keys())
    return held and close(outputs(copy.deepcopy(loaded), batch), outputs(copy.deepcopy(saved), batch))
