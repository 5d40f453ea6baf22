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
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
ENDS = {"pad_token_id": 0, "cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
WINDOWS = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, "drop_path_rate": 0.0}
WITHOUT_INNER = {name: value for name, value in VISION.items() if name != "intermediate_size"}
CONV = {"num_channels": 1, "embedding_size": 16, "num_labels": 3, "depths": [1, 2], "hidden_sizes": [16, 32]}

CONFIGS = {
    "bert": tf.BertConfig(**TEXT, **BODY),
    "roberta": tf.RobertaConfig(**TEXT, **BODY),
    "xlm-roberta": tf.XLMRobertaConfig(**TEXT, **BODY),
    "camembert": tf.CamembertConfig(**TEXT, **BODY),
    "distilbert": tf.DistilBertConfig(**TEXT, **DISTIL),
    "electra": tf.ElectraConfig(**TEXT, **BODY, embedding_size=32),
    "electra-projected": tf.ElectraConfig(**TEXT, **BODY, embedding_size=16),
    "mpnet": tf.MPNetConfig(**TEXT, **BODY),
    "deberta-v2": tf.DebertaV2Config(**TEXT, **BODY, **RELATIVE, position_biased_input=False, type_vocab_size=2),
    "deberta-v3": tf.DebertaV2Config(
        **TEXT, **BODY, **RELATIVE, share_att_key=True, norm_rel_ebd="layer_norm", position_buckets=4
    ),
    "albert": tf.AlbertConfig(**TEXT, **BODY | {"num_hidden_layers": 4}, num_hidden_groups=2, embedding_size=16),
    "modernbert": tf.ModernBertConfig(**TEXT, **BODY, **ENDS, local_attention=8, norm_bias=True),
    "vit": tf.ViTConfig(**VISION),
    "deit": tf.DeiTConfig(**VISION),
    "dinov2": tf.Dinov2Config(**WITHOUT_INNER, mlp_ratio=2, layerscale_value=0.7),
    "dinov2-gated": tf.Dinov2Config(**WITHOUT_INNER, mlp_ratio=3, use_swiglu_ffn=True),
    "dinov2-registers": tf.Dinov2WithRegistersConfig(**WITHOUT_INNER, mlp_ratio=2),
    "beit": tf.BeitConfig(**VISION, use_relative_position_bias=True, layer_scale_init_value=0.7),
    "beit-first": tf.BeitConfig(
        **VISION, use_shared_relative_position_bias=True, use_mean_pooling=False, layer_scale_init_value=0.0
    ),
    "clip-text": tf.CLIPTextConfig(**TEXT, **BODY, eos_token_id=60),
    "clip-images": tf.CLIPVisionConfig(**VISION),
    "clip": tf.CLIPConfig(
        text_config=TEXT | BODY | {"eos_token_id": 60}, vision_config=VISION, projection_dim=24, num_labels=3
    ),
    "swin": tf.SwinConfig(image_size=8, patch_size=1, num_channels=1, num_labels=3, **WINDOWS),
    "resnet-basic": tf.ResNetConfig(**CONV, layer_type="basic"),
    "resnet-bottleneck": tf.ResNetConfig(**CONV | {"hidden_sizes": [32, 64]}, layer_type="bottleneck"),
}
TEXT_TASKS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
IMAGE_TASKS = ("Model", "ForImageClassification")
OTHER_TASKS = {"clip": ("ForImageClassification",)}
OTHER_TASKS |= {"clip-text": ("Model", "ModelWithProjection"), "clip-images": ("Model", "ModelWithProjection")}


def stem(name: str) -> str:
    """ "electra-projected" -> "Electra"."""
    return type(CONFIGS[name]).__name__.removesuffix("Config")


def is_image(name: str) -> bool:
    """Whether the family reads pixels."""
    return hasattr(CONFIGS[name], "num_channels") or hasattr(CONFIGS[name], "vision_config")


def tasks_of(name: str) -> tuple[str, ...]:
    """Heads of transformers that the family has."""
    return OTHER_TASKS.get(name) or (IMAGE_TASKS if is_image(name) else TEXT_TASKS)


ALL = [(name, task) for name in CONFIGS for task in tasks_of(name)]
# of the families whose layers are like another one's, one task is quick
ALIKE = {"roberta": "ForQuestionAnswering", "xlm-roberta": "ForMaskedLM", "camembert": "ForTokenClassification"}
ALIKE |= {"electra-projected": "Model", "deit": "ForImageClassification", "resnet-bottleneck": "Model"}
LATER = {"mpnet": "ForSequenceClassification", "dinov2": "ForImageClassification", "deberta-v3": "ForMaskedLM"}
LATER |= {"modernbert": "ForTokenClassification", "clip-images": "ModelWithProjection", "albert": "ForMaskedLM"}
LATER |= dict.fromkeys(
    ("deberta-v2", "dinov2-gated", "dinov2-registers", "beit", "beit-first", "clip", "clip-text", "swin"), ""
)
SOME_SLOW = some_slow(ALL, [(name, task) for name, task in ALL if (ALIKE | LATER).get(name, task) == task])
ONE_EACH = some_slow(ALL, [(name, task) for name, task in ALL if LATER.get(name, task) == task])
HEADED = {  # one task with a head of each
    name: next(task for task in tasks_of(name) if task.endswith(("Classification", "Projection"))) for name in LATER
}
CLASSIFIERS = [
    (name, "ForImageClassification" if is_image(name) else "ForSequenceClassification")
    for name in CONFIGS
    if name not in LATER
]


def make(name: str, task: str, seed: int = 0) -> tf.PreTrainedModel:
    """A random model whose layers matter: at transformers' own scale of 0.02 all logits would be alike."""
    torch.manual_seed(seed)
    config = CONFIGS[name].__class__(**CONFIGS[name].to_dict())
    if task == "ForQuestionAnswering":
        config.num_labels = 2
    return enlivened(getattr(tf, stem(name) + task)(config).eval())


@torch.no_grad()
def enlivened(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """The same model, in place, with layers and norms that matter."""
    if model.config.model_type != "resnet":
        for parameter in model.parameters():
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
