"""T5, mT5, UMT5 and what is trained from them (FLAN, ByT5): RMS norms without a shift, relative positions that are
added to the scores of each head, scores without a scale, a gate in later versions."""

from ..seq2seq import Seq2SeqLayout, Stack
from . import Family, register_family


def _stack(name: str, ffn: int) -> Stack:
    return Stack(
        stream=("@.shared", f"@.{name}.embed_tokens"),
        blocks=f"@.{name}.block",
        attention="layer.0.SelfAttention",
        attention_norm="layer.0.layer_norm",
        up=tuple(f"layer.{ffn}.DenseReluDense.{layer}" for layer in ("wi", "wi_0", "wi_1")),
        down=f"layer.{ffn}.DenseReluDense.wo",
        ffn_norm=f"layer.{ffn}.layer_norm",
        cross="layer.1.EncDecAttention" if ffn == 2 else None,
        cross_norm="layer.1.layer_norm" if ffn == 2 else None,
        final_norm=f"@.{name}.final_layer_norm",
    )


register_family(
    Family(
        name="T5",
        model_types=("t5", "mt5", "umt5"),
        layout=Seq2SeqLayout(
            encoder=_stack("encoder", 1),
            decoder=_stack("decoder", 2),
            query="q",
            key="k",
            value="v",
            output="o",
            head_size="key_value_proj_dim",
            count="n_heads",
            total_size="inner_dim",
            pre_norm=True,
            heads=("lm_head", "classification_head.dense", "qa_outputs", "classifier"),
            inner_field="d_ff",
            head_field="d_kv",
            epsilon_field="layer_norm_epsilon",
            scales_head=("scale_decoder_outputs", "model_dim"),
        ),
    )
)
