"""ALBERT: BERT's body, of which few blocks run again and again: they are counted, cut and fitted once. The tables have
a width of their own, and a layer stands behind them."""

from ..layouts import EncoderLayout
from . import Family, register_family


register_family(
    Family(
        name="ALBERT",
        model_types=("albert",),
        layout=EncoderLayout(
            stream=(
                "@.embeddings.word_embeddings",
                "@.embeddings.position_embeddings",
                "@.embeddings.token_type_embeddings",
            ),
            stream_norm="@.embeddings.LayerNorm",
            project="@.encoder.embedding_hidden_mapping_in",
            table="@.embeddings.word_embeddings",
            blocks="@.encoder.albert_layer_groups",
            inner="albert_layers",
            repeats=("num_hidden_layers", "num_hidden_groups"),
            attention="attention",
            query="attention.query",
            key="attention.key",
            value="attention.value",
            output="attention.dense",
            attention_norm="attention.LayerNorm",
            up="ffn",
            down="ffn_output",
            ffn_norm="full_layer_layer_norm",
            pooler="@.pooler",
            # that of token classification has no pooler before it
            pooled_by=("classifier", "sop_classifier.classifier"),
            head_reads=("qa_outputs", "predictions.dense"),
            decoder="predictions.decoder",
        ),
        inert_padding=True,
    )
)
