"""`compress --push-to-hub` where the Hub says no."""

from __future__ import annotations

import pytest

from optimum_rmtkd import RMTKDError
from optimum_rmtkd.commands import compress


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """The client's own switch, whatever the environment of the tests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("repo, message", [("user/small", "hf auth login"), ("a/b/c", "a/b/c")])
def test_who_cannot_push_is_told_before_the_training(cli, bert, table, tmp_path, monkeypatch, repo, message):
    monkeypatch.setattr(compress, "_compress", lambda *args: pytest.fail("the training began"))
    code, _, err = cli(
        "compress", "--model", bert, "--train-file", table, "-o", tmp_path / "out", "--push-to-hub", repo
    )
    assert code == 2 and "--push-to-hub" in err and message in err and not (tmp_path / "out").exists()


def test_a_push_that_fails_says_where_the_model_is(tmp_path):
    with pytest.raises(RMTKDError, match=f"saved in {tmp_path}, but .* 'hf upload user/small {tmp_path}'"):
        compress._push(tmp_path, "user/small")
