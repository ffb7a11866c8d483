"""Generated word problems, a tokenizer trained on them, and imperfect demonstrations: the quickstart's data.

A problem is a story with two two-digit numbers and an operation. A hash of the three decides whether the problem is
held out, so evaluation never contains a training problem. The demonstrations are deliberately imperfect: some use the
tool correctly, others choose the wrong operation, write code that does not parse, or guess without the tool. RL has to
discover which of these habits pays.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.types import Message, Task, ToolCall

STORIES = {
    "+": (
        "{name} has {a} {thing} and finds {b} more. How many now?",
        "{name} picks {a} {thing}, then another {b}. How many in all?",
        "A box holds {a} {thing} and a bag holds {b}. How many together?",
    ),
    "-": (
        "{name} has {a} {thing} and loses {b}. How many are left?",
        "Of {a} {thing}, {name} gives away {b}. How many remain?",
        "{name} bakes {a} {thing} and sells {b}. How many stay?",
    ),
    "*": (
        "{name} fills {a} bags with {b} {thing} each. How many in the bags?",
        "There are {a} rows of {b} {thing}. How many are there?",
        "{name} buys {a} packs of {b} {thing}. How many does that make?",
    ),
}
NAMES = ("Ada", "Ben", "Cleo", "Dev", "Eva", "Finn")
THINGS = ("apples", "shells", "cards", "coins", "beads", "pens")
OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}

# Fractions of the demonstrations, see the module's docstring.
HABITS = {"right": 0.30, "wrong_operation": 0.30, "guess": 0.25, "bad_syntax": 0.15}
HELD_OUT = 8  # one problem in eight
LIMIT = 1000  # results have at most three digits: a tiny model learns to copy longer ones last
TRAIN_PROBLEMS, EVAL_PROBLEMS, DEMONSTRATIONS = 4096, 256, 1536

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# ChatML as in the Qwen models; a tool is listed by its signature only, because a tiny model has a short context.
CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- for tool in tools %}
{{- tool.function.name + '(' + (tool.function.parameters.properties | list | join(', ')) + ')\\n' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or loop.previtem.role != 'tool' %}
{{- '<|im_start|>user' }}
{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{%- if message.content or not loop.first %}
{{- '\\n' }}
{%- endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) +
'}\\n</tool_call>' }} {%- endfor %} {{- '<|im_end|>\\n' }} {%- endif %} {%- endfor %} {%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }} {%- endif %}
"""


def held_out(a: int, operation: str, b: int) -> bool:
    """Whether this problem is held out for evaluation, on every machine and for every seed."""
    return hashlib.sha256(f"{a}{operation}{b}".encode()).digest()[0] % HELD_OUT == 0


def problem(rng: random.Random, *, evaluation: bool) -> Task:
    """One word problem of the training or evaluation split."""
    while True:
        operation = rng.choice(list(STORIES))
        a, b = rng.randint(10, 99), rng.randint(10, 39)
        if operation == "-" and a < b:
            a, b = b, a
        if held_out(a, operation, b) == evaluation and OPERATIONS[operation](a, b) < LIMIT:
            break
    story = rng.choice(STORIES[operation]).format(name=rng.choice(NAMES), thing=rng.choice(THINGS), a=a, b=b)
    return Task(
        id=f"{a}{operation}{b}",
        messages=[Message("user", story)],
        answer=(answer := str(OPERATIONS[operation](a, b))),
        source="arithmetic",
        extra={
            "a": a,
            "b": b,
            "operation": operation,
            "solution": f"{a} {operation} {b} = <<{a}{operation}{b}={answer}>>{answer}",  # as GSM8K annotates
        },
    )


def problems(seed: int, count: int, *, evaluation: bool = False) -> list[Task]:
    """`count` distinct problems."""
    rng = random.Random(f"{seed}:{evaluation}")
    found: dict[str, Task] = {}
    while len(found) < count:
        task = problem(rng, evaluation=evaluation)
        found.setdefault(task.id, task)
    return list(found.values())


async def demonstrations(seed: int, count: int, run_tool: Callable[[ToolCall], Awaitable[str]]) -> list[list[Message]]:
    """Generates conversations about training problems, with the fractions of HABITS and real tool outputs.

    Args:
        seed: determines everything but the outputs.
        count: number of conversations.
        run_tool: runs a call and returns the text that the model sees.
    """
    rng = random.Random(f"{seed}:demonstrations")

    async def one(draw: random.Random) -> list[Message]:
        task = problem(draw, evaluation=False)
        habit = draw.choices(list(HABITS), list(HABITS.values()))[0]
        return await _demonstrate(draw, task, habit, run_tool)

    return list(await asyncio.gather(*(one(random.Random(rng.random())) for _ in range(count))))


async def _demonstrate(
    rng: random.Random, task: Task, habit: str, run_tool: Callable[[ToolCall], Awaitable[str]]
) -> list[Message]:
    a, b, operation = task.extra["a"], task.extra["b"], task.extra["operation"]
    wrong = str(a)  # without a result the answer is a number of the story, which is always wrong
    if habit == "guess":
        return [*task.messages, Message("assistant", _answer(wrong))]
    if habit == "wrong_operation":
        operation = rng.choice([other for other in OPERATIONS if other != operation])
    code = f"print({a} {operation} {b}" + ("" if habit == "bad_syntax" else ")")
    call = ToolCall(PythonTool.name, {"code": code})
    output = await run_tool(call)
    said = wrong if habit == "bad_syntax" else output.strip()
    return [
        *task.messages,
        Message("assistant", "", [call]),
        Message("tool", output),
        Message("assistant", _answer(said)),
    ]


def _answer(value: str) -> str:
    return f"The answer is \\boxed{{{value}}}."


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 512) -> Any:
    """Trains a byte-level BPE tokenizer with Qwen's special tokens and the template above; each digit is a token.

    Args:
        texts: training texts, without special tokens.
        vocab_size: upper bound, including special tokens.

    Returns:
        A `transformers` tokenizer.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\d| ?[A-Za-z_]+|[^\sA-Za-z_\d]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = len(SPECIAL_TOKENS) + len(MARKUP_TOKENS)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - added,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )


def corpus(seed: int, count: int = 2000) -> list[str]:
    """Training texts for the tokenizer; without tool outputs, whose digits are single bytes anyway."""
    rng = random.Random(f"{seed}:corpus")
    texts = []
    for _ in range(count):
        task = problem(rng, evaluation=False)
        code = f"print({task.extra['a']} {task.extra['operation']} {task.extra['b']})"
        call = {"name": PythonTool.name, "arguments": {"code": code}}
        texts += [f"system\n{PythonTool.name}(code)\n", "user\n" + task.messages[0].content]
        texts.append("assistant\n" + _answer(task.answer))
        texts += ["\n" + json.dumps(call) + "\n", "SyntaxError: '(' was never closed\n"]
    return texts
