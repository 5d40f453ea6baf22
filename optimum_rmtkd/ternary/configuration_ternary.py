"""Config of ternary networks; copied into saved repositories, so it imports transformers alone."""

from transformers import PreTrainedConfig


CONFIG_HOOKS = []  # called when a config is first made: modelling code is slow to import
CHECKS = []  # of the fields, by the modelling code: before transformers makes lists of them and logs them


class TernaryMLPConfig(PreTrainedConfig):
    """Config of a ternary network.

    `network` holds the arguments of `layers_rmtkd.TernaryMLP` except `out_features`, which is `num_labels`; `recipe`
    and `report` say how it was made.
    """

    model_type = "ternary_mlp"
    network: dict | None = None
    recipe: dict | None = None
    report: dict | None = None

    def __new__(cls, *args, **kwargs):
        while CONFIG_HOOKS:
            CONFIG_HOOKS.pop()()
        for check in CHECKS:
            check(kwargs)
        return object.__new__(cls)
