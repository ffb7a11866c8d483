"""The published tool's code and output, and the one function that cuts tool output."""

import pytest

from open_agentrl_jax.agent.python_tool import prepare_code
from open_agentrl_jax.reference.python_tool import shorten_output
from open_agentrl_jax.text import cut_middle


def test_long_output_loses_its_middle():
    text = "".join(map(str, range(1000)))
    assert shorten_output(text, 256) == f"{text[:128]}...(truncated)...{text[-128:]}"
    assert (
        cut_middle(text, 100)
        == f"{text[:50]}\n[... {len(text) - 100} characters cut from the middle ...]\n{text[-50:]}"
    )
    for cut in (shorten_output, cut_middle):
        assert cut(text, len(text)) == text and cut("", 0) == ""
        assert cut("ab", 1).startswith(("...", "\n[... 2")), "nothing of two characters is left in one"


def test_an_unknown_mode_of_prepare_code():
    with pytest.raises(ValueError, match="must be one of robust, reference"):
        prepare_code("1", mode="referense")
