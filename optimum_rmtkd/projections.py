"""The subspace projections of RdimKD, under the name that scripts import them from."""

from __future__ import annotations

from .distillation.subspaces import *  # noqa: F403
from .distillation.subspaces import __all__ as __all__
