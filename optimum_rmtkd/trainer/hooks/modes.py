"""Training arguments that tie something to the layers of a model: they are refused where those are exchanged."""

from __future__ import annotations

from typing import Any

from ...errors import RMTKDError


__all__ = ["check_modes"]


def check_modes(args: Any) -> None:
    """Arguments of transformers that cannot follow a model whose layers are exchanged in the midst of training.

    Raises:
        RMTKDError: one of them is set; names it, why, and what to do.
    """
    optim = str(getattr(args.optim, "value", args.optim))
    refused = {
        f"optim={optim!r}": (
            "lomo" in optim or optim.endswith("layerwise"),
            "it steps inside the backward pass, by hooks on the very parameters that a cut replaces. Take another one "
            "(optim='adamw_torch', 'adafactor')",
        ),
        "use_liger_kernel=True": (
            args.use_liger_kernel,
            "its kernels are put into the layers of one architecture, and a cut makes other ones. Leave it out, or "
            "cut first with optimum_rmtkd.narrow",
        ),
        "debug='underflow_overflow'": (
            "underflow_overflow" in {getattr(option, "value", option) for option in args.debug},
            "it watches the very layers that a cut replaces. Leave it out, or look for the overflow without cuts "
            "(schedule='none')",
        ),
    }
    for what, (asked, why) in refused.items():
        if asked:
            raise RMTKDError(f"{what} cannot be used while the model is cut: {why}.")
