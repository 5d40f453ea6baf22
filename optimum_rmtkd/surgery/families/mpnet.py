"""MPNet: BERT's body without token types, one table of biases by distance for all layers, a head's scale from its
width."""

from ..layouts import EncoderLayout
from . import Family, register_family


register_family(
    Family(
        name="MPNet",
        model_types=("mpnet",),
        layout=EncoderLayout(
            stream=("@.embeddings.word_embeddings", "@.embeddings.position_embeddings"),
            stream_norm="@.embeddings.LayerNorm",
            table="@.embeddings.word_embeddings",
            blocks="@.encoder.layer",
            attention="attention.attn",
            scale="",
            query="attention.attn.q",
            key="attention.attn.k",
            value="attention.attn.v",
            output="attention.attn.o",
            attention_norm="attention.LayerNorm",
            up="intermediate.dense",
            down="output.dense",
            ffn_norm="output.LayerNorm",
            pooler="@.pooler.dense",
            pooled_by=("classifier",),  # of multiple choice; that of token classification has no pooler before it
            head_reads=("classifier.dense", "qa_outputs", "lm_head.dense"),
            decoder="lm_head.decoder",
            dense_head=("classifier.dense", "classifier.out_proj"),
        ),
        inert_padding=True,
    )
)
