"""RoBERTa and its namesakes: BERT's body, a two-layer classification head, a tied `lm_head`."""

from ..layouts import EncoderLayout
from . import Family, register_family


register_family(
    Family(
        name="RoBERTa",
        model_types=("roberta", "xlm-roberta", "camembert"),
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
            pooled_by=("classifier",),  # of multiple choice; that of token classification has no pooler before it
            head_reads=("classifier.dense", "qa_outputs", "lm_head.dense"),
            decoder="lm_head.decoder",
            dense_head=("classifier.dense", "classifier.out_proj"),
        ),
        inert_padding=True,
    )
)
