"""The published math grader (Gen-Verse/Open-AgentRL, math_dapo with strict boxes): the last box as a string.

Only a box that begins within the last 100 characters counts. Braces are counted without regard to escapes, and nothing
is normalised.
"""

from __future__ import annotations

from open_agentrl_jax.types import Score


def grade(text: str, truths: list[str]) -> Score:
    """Score +1 / -1, accuracy 1 / 0, and the content of the box as prediction ("" where there is none)."""
    tail = text[-300:][-100:]
    start = tail.rfind("\\boxed{")
    depth = 0
    for i in range(start + 6, len(tail)) if start >= 0 else ():
        depth += (tail[i] == "{") - (tail[i] == "}")
        if depth == 0:
            prediction = tail[start + 7 : i]
            right = prediction in truths
            return Score(1.0 if right else -1.0, float(right), prediction)
    return Score(-1.0, 0.0, "")
