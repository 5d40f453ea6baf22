"""Ternary fully-connected networks as models of their own: features in, logits out.

The layers are those of narrowed models. A saved repository carries the files side by side, and
`trust_remote_code=True` runs them without this package; they import torch and transformers alone.
"""

import contextlib
import os
import re
import sys
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from optimum_rmtkd.layers_rmtkd import TernaryMLP
from optimum_rmtkd.loading_rmtkd import finalizing, load_checked, named_errors
from optimum_rmtkd.spec_rmtkd import check_fields, check_network

from .configuration_ternary import CHECKS, TernaryMLPConfig


# A context that yields a folder beside another one, and lets its files take their places there if all went well: lent
# by the package. Without it files are written in place, as transformers does.
WRITERS = []
UPLOAD_OPTIONS = ("repo_id", "commit_message", "private", "create_pr")  # of `push_to_hub`


def _check_config(fields):
    check_fields(fields, TernaryMLPConfig)
    if fields.get("network") is not None:
        check_network(fields["network"])


CHECKS.append(_check_config)


def _lay_beside(folder):
    """Let the saved file import the layers and the schema from beside it, and put their files there.

    transformers copies the file of a class, and those that it imports relatively from the same folder; ours lie in
    two. In a saved repository they lie in one, and nothing is left to do.
    """
    source = Path(__file__).read_text(encoding="utf8")
    relative, count = re.subn(r"^from optimum_rmtkd\.(\w+) import", r"from .\1 import", source, flags=re.MULTILINE)
    target = Path(folder) / Path(__file__).name
    if count and target.is_file():
        target.write_text(relative, encoding="utf8")
        for part in (TernaryMLP, load_checked, check_network):
            file = Path(sys.modules[part.__module__].__file__)
            (Path(folder) / file.name).write_text(file.read_text(encoding="utf8"), encoding="utf8")


class _TernaryMLPModel(PreTrainedModel):
    config_class = TernaryMLPConfig
    base_model_prefix = ""
    main_input_name = "features"
    _finalize_model_loading = finalizing(PreTrainedModel)

    def __init__(self, config):
        check_network(config.network)
        super().__init__(config)
        with named_errors("ternary network"):
            self.mlp = TernaryMLP(out_features=config.num_labels, **config.network)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return load_checked(cls, super().from_pretrained, *args, body="mlp.layers.", **kwargs)

    def save_pretrained(self, save_directory, *args, push_to_hub=False, **kwargs):
        upload = {name: kwargs.pop(name) for name in UPLOAD_OPTIONS if name in kwargs}
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        whole = bool(WRITERS) and is_main_process and not os.path.isfile(save_directory)
        with WRITERS[-1](save_directory) if whole else contextlib.nullcontext(save_directory) as folder:
            super().save_pretrained(folder, *args, **kwargs)
            _lay_beside(folder)
        if push_to_hub:  # not left to transformers, which would upload before the files are laid beside each other
            shared = {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
            self.push_to_hub(**{"repo_id": Path(save_directory).absolute().name, **upload, **shared})

    def loss_of(self, logits, labels):
        raise NotImplementedError

    def forward(self, features, labels=None, return_dict=None, **kwargs):
        """Run the network.

        Args:
            features: (batch, in_features), raw: centring and scaling are part of the model.
            labels: (batch,) class indices, or (batch,) / (batch, num_labels) targets of a regression.

        Returns:
            SequenceClassifierOutput with logits (batch, num_labels) and, given labels, the loss.
        """
        logits = self.mlp(features.to(self.mlp.readout.weight.dtype))
        loss = None if labels is None else self.loss_of(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class TernaryMLPForClassification(_TernaryMLPModel):
    """A ternary network whose outputs are class scores; the loss is the cross-entropy."""

    def loss_of(self, logits, labels):
        return nn.functional.cross_entropy(logits.float(), labels.view(-1))


class TernaryMLPForRegression(_TernaryMLPModel):
    """A ternary network whose outputs are numbers; the loss is the mean squared error."""

    def loss_of(self, logits, labels):
        return nn.functional.mse_loss(logits.float(), labels.view_as(logits).float())
