"""Which rows of a token table a domain needs, and the tokenizer that goes with them.

`texts` reads and counts, `pieces` knows what a tokenizer's model needs, `choice` chooses, `tables` finds and copies
the tensors of a model that are indexed by tokens, `tokenizer` and `ids` renumber, `verifying` holds the result against
its promise. Nothing here knows a family of models, or narrows or trains one.
"""

from .report import HeldOut, VocabularyReport
from .trimming import trim_vocabulary


__all__ = ["HeldOut", "VocabularyReport", "trim_vocabulary"]
