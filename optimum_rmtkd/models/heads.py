"""What the head of a model answers to: told by its class, within the wrappers of other libraries."""

from __future__ import annotations

from torch import nn


__all__ = ["has_head", "shifts_labels", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of PEFT and torch.compile, whose own forward names nothing."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_head(model: nn.Module, mapping: str) -> bool:
    """Is this one of the classes that an auto class knows, or reduced from one, or wrapped by PEFT?

    Args:
        mapping: "CAUSAL_LM", "QUESTION_ANSWERING", "MULTIPLE_CHOICE", ... of transformers' auto mappings.
    """
    from transformers.models.auto import modeling_auto

    known = set(getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values())
    return any(cls.__name__ in known for cls in type(unwrapped(model)).__mro__)


def shifts_labels(model: nn.Module) -> bool:
    """Whether the answer at one position is for the label at the next: causal language models, not
    encoder-decoders."""
    if getattr(model.config, "is_encoder_decoder", False):
        return False
    # Older classes (GPT2LMHeadModel) do not name their loss, and a reduced class has the name of none.
    named = getattr(unwrapped(model), "loss_type", None)
    return named == "ForCausalLM" or named is None and has_head(model, "CAUSAL_LM")
