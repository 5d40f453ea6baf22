"""BERT: post-norm encoder, pooler of hidden width, tied masked-LM decoder."""

from ..layouts import EncoderLayout
from . import Family, register_family


register_family(
    Family(
        name="BERT",
        model_types=("bert",),
        layout=EncoderLayout(
            stream=(
                "@.embeddings.word_embeddings",
                "@.embeddings.position_embeddings",
                "@.embeddings.token_type_embeddings",
            ),
            stream_norm="@.embeddings.LayerNorm",
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
            pooler="@.pooler.dense",
            pooled_by=("classifier", "cls.seq_relationship"),
            head_reads=("qa_outputs", "cls.predictions.transform.dense"),
            decoder="cls.predictions.decoder",
        ),
        inert_padding=True,
    )
)
