"""Makes narrowed models known to transformers' Auto classes, without importing torch before anybody needs it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType


__all__ = ["install", "register_model_type"]

LIBRARY = "transformers."
AUTO_CONFIG = "transformers.models.auto.configuration_auto"  # whatever Auto class is used, it reads a config first
CONFIGS = {
    "bert": "BertConfig",
    "roberta": "RobertaConfig",
    "xlm-roberta": "XLMRobertaConfig",
    "camembert": "CamembertConfig",
    "distilbert": "DistilBertConfig",
    "electra": "ElectraConfig",
    "vit": "ViTConfig",
    "deit": "DeiTConfig",
    "resnet": "ResNetConfig",
}


def install() -> None:
    """Register now if transformers' Auto classes are loaded, else as soon as they are.

    transformers calls no entry points, so whoever wants its Auto classes to know more must import something; waiting
    for the Auto classes themselves keeps `import optimum_rmtkd` free of torch.
    """
    if _ready():
        _register_configs()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _ready(but: str = "") -> bool:
    """Whether the Auto configs are loaded and no module of transformers but `but` is half-way.

    Any model's config module may be the first to import the Auto classes; as long as it is half-way, its own config
    class cannot be imported from within.
    """
    halfway = (
        name
        for name, module in list(sys.modules.items())
        if name.startswith(LIBRARY)
        and name != but
        and getattr(getattr(module, "__spec__", None), "_initializing", False)
    )
    return AUTO_CONFIG in sys.modules and not any(halfway)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds modules of transformers as Python would, and registers behind the outermost import that brings the Auto
    classes; then it is gone."""

    def find_spec(self, name, path=None, target=None):
        if not name.startswith(LIBRARY):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path and _ready(but=name):
                sys.meta_path.remove(self)
                _register_configs()

        spec.loader.exec_module = exec_module
        return spec


def _register_configs() -> None:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from . import modeling_rmtkd

    lend_errors()
    modeling_rmtkd.METHODS.update(push_to_hub=_push_to_hub, save_pretrained=_save_pretrained)
    if _register_models not in modeling_rmtkd.CONFIG_HOOKS:
        modeling_rmtkd.CONFIG_HOOKS.append(_register_models)
    CONFIG_MAPPING._extra_content = _AnyReduced(CONFIG_MAPPING._extra_content)
    for name in CONFIGS.values():
        if hasattr(transformers, name):
            _register_config(modeling_rmtkd.reduced_class(getattr(transformers, name)))
    _register_ternary()


def lend_errors() -> None:
    """The files of a saved repository know nothing of the package: the package lends its error."""
    from . import layers_rmtkd, loading_rmtkd, modeling_rmtkd, spec_rmtkd
    from .errors import SpecMismatchError

    for module in (layers_rmtkd, loading_rmtkd, modeling_rmtkd, spec_rmtkd):
        module.SpecMismatchError = SpecMismatchError


def _push_to_hub(self, repo_id: str, *args, **kwargs):
    from .hub.pushing import push_to_hub

    return push_to_hub(self, repo_id, *args, **kwargs)


def _save_pretrained(self, save_directory, *args, **kwargs) -> None:
    from .hub.saving import save_pretrained

    save_pretrained(self, save_directory, *args, **kwargs)


def _register_ternary() -> None:
    from .ternary import configuration_ternary

    if _register_ternary_models not in configuration_ternary.CONFIG_HOOKS:
        configuration_ternary.CONFIG_HOOKS.append(_register_ternary_models)
    _register_config(configuration_ternary.TernaryMLPConfig)


def _register_ternary_models() -> None:
    from transformers import AutoModel

    from .hub.saving import saving_into
    from .ternary import modeling_ternary as ternary

    if saving_into not in ternary.WRITERS:
        ternary.WRITERS.append(saving_into)
    classes = (ternary.TernaryMLPForClassification, ternary.TernaryMLPForRegression)
    AutoModel.register(ternary.TernaryMLPConfig, classes, exist_ok=True)  # told apart by the config's `architectures`
    for cls in classes:
        cls.register_for_auto_class("AutoModel")


class _AnyReduced(dict):
    """{model_type: config class} of narrowed models, made when first asked for: any architecture of transformers may
    have been narrowed in factored form, and making all classes at once would import them all."""

    def __contains__(self, model_type) -> bool:
        return super().__contains__(model_type) or self._make(model_type)

    def __getitem__(self, model_type):
        if model_type not in self:
            raise KeyError(model_type)
        return super().__getitem__(model_type)

    def _make(self, model_type) -> bool:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        from . import modeling_rmtkd

        prefix = modeling_rmtkd.PREFIX.lower() + "_"
        if not isinstance(model_type, str) or not model_type.startswith(prefix):
            return False
        base = getattr(transformers, CONFIG_MAPPING_NAMES.get(model_type.removeprefix(prefix), ""), None)
        if base is None:
            return False
        self[model_type] = config_class = modeling_rmtkd.reduced_class(base)
        config_class.register_for_auto_class()
        return True


def _register_config(config_class: type) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    if config_class.model_type not in CONFIG_MAPPING:
        AutoConfig.register(config_class.model_type, config_class)
        # makes save_pretrained copy the file and write auto_map, for readers without the plugin
        config_class.register_for_auto_class()


def _register_models(config_class: type) -> None:
    """Register the model classes of one narrowed config, when it is first used: modelling code is slow to import."""
    import transformers
    from transformers.models.auto import modeling_auto

    from . import modeling_rmtkd

    if getattr(config_class, "_rmtkd_registered", False):
        return
    config_class._rmtkd_registered = True
    base = config_class.__mro__[1]
    _register_config(config_class)
    _share_tokenizer(base, config_class)
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is None or base not in mapping:
            continue
        classes = mapping[base] if isinstance(mapping[base], (tuple, list)) else (mapping[base],)
        # some classes serve the configs of others, whose models they are not
        own = [cls for cls in classes if hasattr(transformers, cls.__name__) and cls.config_class is base]
        reduced = [modeling_rmtkd.reduced_class(cls) for cls in own]
        if reduced:
            # several classes of one config are told apart by its `architectures`, as for the dense ones
            auto.register(config_class, reduced[0] if len(reduced) == 1 else tuple(reduced), exist_ok=True)
        for cls in reduced:
            # a class serves several Auto classes; remote code is told the one it is named after, else that of its task
            named_after = cls.__name__.endswith(auto.__name__.removeprefix("AutoModel") or "Model")
            if named_after or cls._auto_class in (None, "AutoModelForPreTraining"):
                cls.register_for_auto_class(auto.__name__)


def _share_tokenizer(base: type, config_class: type) -> None:
    """Narrowed models read what their dense ones do."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    for mapping in (TOKENIZER_MAPPING, IMAGE_PROCESSOR_MAPPING):
        if base in mapping and config_class not in mapping:
            mapping.register(config_class, mapping[base])


def register_model_type(config_class: type) -> None:
    """Make narrowed models of a user's own family known to the Auto classes.

    Args:
        config_class: the dense model's config class; it must be an attribute of `transformers`.
    """
    from . import modeling_rmtkd

    _register_models(modeling_rmtkd.reduced_class(config_class))
