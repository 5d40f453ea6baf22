"""`push_to_hub` of a reduced model: what transformers does, and a card that says what the model is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .card import CARD, license_of, model_card
from .run import Run


if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["push_to_hub"]


def push_to_hub(model: PreTrainedModel, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """As `PreTrainedModel.push_to_hub`. A repository without a card gets one of the model's config: base model, sizes,
    recipe, how to load it. A card that is there already stays.

    Returns:
        What transformers returns, the `CommitInfo` of the model's files.
    """
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel

    revision, token = kwargs.get("revision"), kwargs.get("token")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=kwargs.get("private"), exist_ok=True).repo_id
    there = api.file_exists(repo_id, CARD, revision=revision)
    done = PreTrainedModel.push_to_hub(model, repo_id, *args, **kwargs)
    if not there:
        # a pull request that was opened for the files takes the card as well
        card = card_of(model, repo_id, tags=kwargs.get("tags"))
        card.push_to_hub(repo_id, token=token, revision=done.pr_revision or revision)
    return done


def card_of(model: PreTrainedModel, repository: str, tags: Any = None) -> Any:
    """The card of a reduced model of which nothing but itself is at hand."""
    from ..surgery import count_parameters, uncut_parameters

    sizes = uncut_parameters(model), count_parameters(model)
    run = Run(repository.split("/")[-1], model.config.to_dict(), results={"parameters": sizes})
    tags = [*(model.model_tags or []), *([tags] if isinstance(tags, str) else tags or [])]
    return model_card(run, repository, license=license_of(run.base_repository), tags=tags)
