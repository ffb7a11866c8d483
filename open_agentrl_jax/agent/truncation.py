"""Shortens tool output to a budget."""

from __future__ import annotations

NOTICE = "\n[... {} characters cut from the middle ...]\n"


def cut_middle(text: str, characters: int, notice: str = NOTICE) -> str:
    """Text whose middle is replaced by a notice where it is longer than `characters`.

    Args:
        text: the output of a tool.
        characters: characters that are kept, half from each end. The notice comes on top of them.
        notice: replaces the middle; "{}" in it becomes the number of characters that were cut.
    """
    half = characters // 2
    if len(text) <= characters:
        return text
    return text[:half] + notice.format(len(text) - 2 * half) + text[len(text) - half :]
