"""DistilBERT: post-norm encoder without token types; `pre_classifier` plays the pooler."""

from ..layouts import EncoderLayout
from . import Family, register_family


register_family(
    Family(
        name="DistilBERT",
        model_types=("distilbert",),
        layout=EncoderLayout(
            stream=("@.embeddings.word_embeddings", "@.embeddings.position_embeddings"),
            stream_norm="@.embeddings.LayerNorm",
            table="@.embeddings.word_embeddings",
            blocks="@.transformer.layer",
            attention="attention",
            heads="n_heads",
            total_size="dim",
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            output="attention.out_lin",
            attention_norm="sa_layer_norm",
            up="ffn.lin1",
            down="ffn.lin2",
            ffn_norm="output_layer_norm",
            pooler="pre_classifier",
            pooled_by=("classifier",),
            head_reads=("qa_outputs", "vocab_transform"),
            decoder="vocab_projector",
            width_field="dim",
        ),
        inert_padding=True,
    )
)
