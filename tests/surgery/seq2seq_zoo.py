"""Tiny random encoder-decoders of every family, and texts for them."""

from __future__ import annotations

import torch
import transformers as tf
from torch import nn

from optimum_rmtkd.batches import run


T = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
}
B = {
    "vocab_size": 61,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}

CONFIGS = {
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config(**T)),
    "mt5-gated": (tf.MT5ForConditionalGeneration, tf.MT5Config(**T, feed_forward_proj="gated-gelu")),
    "t5-untied": (
        tf.T5ForConditionalGeneration,
        tf.T5Config(**T, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "bart": (tf.BartForConditionalGeneration, tf.BartConfig(**B, scale_embedding=True)),
    "mbart": (tf.MBartForConditionalGeneration, tf.MBartConfig(**B, scale_embedding=True)),
    "marian": (tf.MarianMTModel, tf.MarianConfig(**B, scale_embedding=True)),
    "pegasus": (tf.PegasusForConditionalGeneration, tf.PegasusConfig(**B, scale_embedding=True)),
    "whisper": (
        tf.WhisperForConditionalGeneration,
        tf.WhisperConfig(**B | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 40}),
    ),
}
# of the same code
KIN = {
    "umt5": (tf.UMT5ForConditionalGeneration, tf.UMT5Config(**T)),
    "plbart": (tf.PLBartForConditionalGeneration, tf.PLBartConfig(**B)),
    "blenderbot": (tf.BlenderbotForConditionalGeneration, tf.BlenderbotConfig(**B)),
    "blenderbot-small": (tf.BlenderbotSmallForConditionalGeneration, tf.BlenderbotSmallConfig(**B)),
    "marian-apart": (
        tf.MarianMTModel,
        tf.MarianConfig(**B, share_encoder_decoder_embeddings=False, decoder_vocab_size=61),
    ),
}

NORMED = ("bart", "plbart", "blenderbot-small", "mbart", "marian", "marian-apart")  # norms stand in the stream itself
EXACT = ("pegasus", "blenderbot", "whisper")  # layer norms compute in the dtype they get, RMS norms in fp32


def make(name: str, seed: int = 0) -> tf.PreTrainedModel:
    """A random model whose layers and norms matter."""
    torch.manual_seed(seed)
    cls, config = (CONFIGS | KIN)[name]
    return enlivened(cls(type(config)(**config.to_dict())), untied=name.endswith("untied"))


def enlivened(model: tf.PreTrainedModel, untied: bool = False) -> tf.PreTrainedModel:
    """The same model, in place, with layers and norms that matter; `untied`: as loaded from a file that holds an
    output layer of its own."""
    model.eval()
    if untied:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(torch.randn_like(head.weight))
        model.all_tied_weights_keys.pop("lm_head.weight")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # the tables of T5 are large from the start, its scores are not scaled
                parameter.mul_(1.0 if "t5" in model.config.model_type else 10.0)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


def batches(name: str = "t5", count: int = 6, size: int = 8, lengths: tuple[int, int] = (14, 9)) -> list[dict]:
    """Calibration batches: sources, half of them padded, or sounds; and labels, some shorter than others."""
    generator, made = torch.Generator().manual_seed(1), []
    for _ in range(count):
        ids, labels = (torch.randint(3, 61, (size, length), generator=generator) for length in lengths)
        mask = torch.ones_like(ids)
        mask[::2, -3:] = 0
        labels[1::2, -2:] = -100
        if name == "whisper":
            made.append({"input_features": torch.randn(size, 8, 20, generator=generator), "labels": labels})
            continue
        made.append({"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels})
    return made


@torch.no_grad()
def logits(model: tf.PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(tokens, words) where there is a label."""
    return run(model, batch).logits[batch["labels"] != -100]
