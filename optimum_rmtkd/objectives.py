"""The objectives, under the name that scripts import them from."""

from __future__ import annotations

from .distillation.objectives import *  # noqa: F403
from .distillation.objectives import __all__ as __all__
