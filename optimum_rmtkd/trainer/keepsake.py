"""The model just after its cut, kept while its stage is open: distilling may make it worse. Knows a host, no run."""

from __future__ import annotations

import torch

from ..reparameterization import Reparameterization
from . import plain
from .host import Training
from .swap import assign, in_engine


__all__ = ["Keepsake"]


class Keepsake:
    """Attributes:
    tensors: plain weights by name, of a sharded model this process's shards; None where nothing is kept.
    """

    def __init__(self, host: Training, how: Reparameterization | None):
        self.host, self.how = host, how
        self.tensors: dict[str, torch.Tensor] | None = None

    @property
    def _written_over(self) -> bool:
        """Whether values can be copied into the very tensors that are trained."""
        return self.how is None and not in_engine(self.host.model)

    def reset(self) -> None:
        """Keep nothing."""
        self.tensors = None

    def keep(self) -> None:
        """The model as it is now."""
        model = self.host.model if self._written_over else plain.plain(self.host.model)
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def put_back(self) -> None:
        """The model becomes what it was; the optimizer's state, which came after, is dropped."""
        if self._written_over:
            for name, tensor in self.host.model.state_dict().items():
                assign(tensor, self.tensors[name])
        else:
            twin = plain.plain_copy(self.host.model)
            twin.load_state_dict(self.tensors)
            self.host.install(plain.put_on(self.how, twin))
        self.host.forget_moments()
