"""What an evaluation returned, as the numbers that judge a model. Plain functions over dictionaries."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from ..hub.measures import of_quality
from ..validation.wording import shown


__all__ = ["numbers_of"]

logger = logging.getLogger(__name__)


def numbers_of(returned: Mapping[str, Any], asked: str | None, said: set[str]) -> dict[str, float]:
    """The numbers among what was returned; a metric that was asked for and is there, but is no number (None, a list of
    one value a class), is NaN: given, and of no use.

    Args:
        asked: the metric that the user named, as it is there or without the prefix that evaluations give it.
        said: metrics of which the log has that already; grows.
    """
    found = of_quality(returned)
    for name in returned if asked is not None else ():
        if name in found or not (name == asked or name.endswith(f"_{asked.removeprefix('eval_')}")):
            continue
        found[name] = math.nan
        if name not in said:
            said.add(name)
            logger.warning(
                "The evaluation gave %s=%s, which is no number: expected one, such as 0.91. It is taken as NaN.",
                name,
                shown(returned[name]),
            )
    return found
