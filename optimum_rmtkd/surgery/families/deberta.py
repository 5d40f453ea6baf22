"""DeBERTa V2 and V3: BERT's body; attention also reads a table of relative positions, which lies in the coordinates of
the stream, through layers of its own or through those of queries and keys. A head's scale follows from its width."""

from ..layouts import EncoderLayout
from . import Family, register_family


register_family(
    Family(
        name="DeBERTa V2 and V3",
        model_types=("deberta-v2",),
        layout=EncoderLayout(
            stream=(
                "@.embeddings.word_embeddings",
                "@.embeddings.position_embeddings",
                "@.embeddings.token_type_embeddings",
            ),
            stream_norm="@.embeddings.LayerNorm",
            beside=("@.encoder.rel_embeddings", "@.encoder.LayerNorm"),
            project="@.embeddings.embed_proj",
            norm_after_project=True,
            table="@.embeddings.word_embeddings",
            blocks="@.encoder.layer",
            attention="attention.self",
            scale="",
            score_terms=("pos_att_type", ("c2p", "p2c")),
            query="attention.self.query_proj",
            key="attention.self.key_proj",
            value="attention.self.value_proj",
            position_query="attention.self.pos_query_proj",
            position_key="attention.self.pos_key_proj",
            output="attention.output.dense",
            attention_norm="attention.output.LayerNorm",
            up="intermediate.dense",
            down="output.dense",
            ffn_norm="output.LayerNorm",
            pooler="pooler.dense",
            pooled_by=("classifier",),  # that of token classification has no pooler before it
            head_reads=("qa_outputs", "cls.predictions.transform.dense"),
            decoder="cls.predictions.decoder",
            width_fields=("pooler_hidden_size",),
            needs={"conv_kernel_size": 0},
            undeclared=("lm_predictions",),  # of masked language models with legacy=False
        ),
        inert_padding=True,
    )
)
