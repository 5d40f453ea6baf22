"""ELECTRA: BERT's body; the tables have a width of their own where `embeddings_project` stands behind them."""

from ..layouts import EncoderLayout
from . import Family, register_family


register_family(
    Family(
        name="ELECTRA",
        model_types=("electra",),
        layout=EncoderLayout(
            stream=(
                "@.embeddings.word_embeddings",
                "@.embeddings.position_embeddings",
                "@.embeddings.token_type_embeddings",
            ),
            stream_norm="@.embeddings.LayerNorm",
            project="@.embeddings_project",
            table="@.embeddings.word_embeddings",
            blocks="@.encoder.layer",
            attention="attention.self",
            query="attention.self.query",
            key="attention.self.key",
            value="attention.self.value",
            output="attention.output.dense",
            attention_norm="attention.output.LayerNorm",
            up="intermediate.dense",
            down="output.dense",
            ffn_norm="output.LayerNorm",
            pooler="sequence_summary.summary",
            pooled_by=("classifier",),  # of multiple choice; that of token classification has no summary before it
            head_reads=(
                "classifier.dense",
                "qa_outputs",
                "generator_predictions.dense",
                "discriminator_predictions.dense",
            ),
            decoder="generator_lm_head",
            dense_head=("classifier.dense", "classifier.out_proj"),
        ),
        inert_padding=True,
    )
)
