"""Random inputs of a model, as long as somebody wants them: what it is exported and timed with."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .explaining import position_limit


__all__ = ["example_inputs", "longest_text", "unpadded_inputs"]


def example_inputs(model: PreTrainedModel, batch: int, length: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of a model: token ids with a mask that pads the last row, or pixels.

    Returns:
        `input_ids`, `attention_mask` (and `token_type_ids` where the model has types, `decoder_input_ids` where it has
        a decoder beside the encoder): (batch, length) int64; or
        `pixel_values`: (batch, channels, size, size) fp32; or `features`: (batch, d) fp32.
    """
    generator, config = torch.Generator().manual_seed(seed), model.config
    if model.main_input_name == "features":
        return {"features": torch.randn(batch, config.network["in_features"], generator=generator)}
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return {"pixel_values": torch.randn(batch, config.num_channels, height, width, generator=generator)}
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    # RoBERTa counts positions by the padding token: random ids must not hold it
    padding = config.pad_token_id
    if padding is not None:
        ids = torch.where(ids == padding, (ids + 1) % config.vocab_size, ids)
    mask = torch.ones_like(ids)
    mask[-1, length - length // 4 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if (getattr(config, "type_vocab_size", 0) or 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs


def unpadded_inputs(model: PreTrainedModel, batch: int, length: int | None) -> dict[str, torch.Tensor]:
    """The same without padding, every token being work, on the device and in the number format of the model."""
    inputs = example_inputs(model, batch, length or 1)
    inputs.pop("attention_mask", None)
    return {k: v.to(model.device, model.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


def longest_text(model: PreTrainedModel) -> int | None:
    """Tokens of the longest text: by the tables of absolute positions, else by the config; None without either."""
    said = getattr(model.config, "max_position_embeddings", None)
    limit = position_limit(model) or (said if isinstance(said, int) else None)
    return limit if limit and limit > 0 else None  # XLNet says -1
