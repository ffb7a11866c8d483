"""Shapes a grader's score: the overlong penalty and the turn bonus. Accuracy never changes."""

from __future__ import annotations

TURN_BONUS_MODES = ("off", "paper", "reference")


def overlong_penalty(length: int, *, max_length: int, buffer: int, factor: float = 1.0) -> float:
    """The penalty for a response that enters the last `buffer` tokens of its budget (DAPO's soft punishment).

    Args:
        length: tokens of the response. The caller decides whether tool tokens count (the reference counts them).
        max_length: the response budget in tokens.
        buffer: width in tokens of the zone where the penalty grows from 0 to -factor; 0 disables the penalty.
        factor: the penalty at `length == max_length`. There is no floor: a longer response is penalised more.

    Returns:
        A number <= 0 to add to the score.
    """
    if not 0 <= buffer <= max_length:
        raise ValueError(f"overlong buffer {buffer} must lie between 0 and max_length {max_length}")
    if buffer == 0:
        return 0.0
    return min((max_length - buffer - length) / buffer * factor, 0.0)


def turn_bonus(score: float, num_turns: int, *, mode: str) -> float:
    """The score after the paper's reward for using the tool.

    Args:
        score: the grader's score, before any other shaping.
        num_turns: 1 (the prompt) + assistant generations + tool rounds, so (num_turns - 2) / 2 tool rounds.
        mode: "off" changes nothing; "paper" is eq. 8 of arXiv 2510.11701 (+0.1 per tool round, right or wrong);
            "reference" is the published code: only a negative score rises, and at most to -0.6.

    Returns:
        The new score.
    """
    rounds = max(num_turns - 2, 0) / 2
    if mode == "off":
        return score
    if mode == "paper":
        return score + 0.1 * rounds
    if mode == "reference":
        return min(-0.6, score + 0.1 * (num_turns - 2) / 2) if score < 0 else score
    raise ValueError(f"turn bonus mode {mode!r} must be one of {', '.join(TURN_BONUS_MODES)}")
