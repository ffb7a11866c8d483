"""An agent that knows nothing of training: the `openai` package, a loop, and a tool that runs Python.

It reads its problem from TASK_FILE and its model from OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL. Run on its own
against any server, it works the same way. configs/quickstart_harness.py trains it.
"""

import asyncio
import contextlib
import io
import json
import os
from typing import Any

import openai

TOOL = {
    "type": "function",
    "function": {
        "name": "code_interpreter",
        "description": "Runs Python code and returns its output.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    },
}


def run_python(arguments: str) -> str:
    """What the code prints, or the last line of its error."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            exec(json.loads(arguments)["code"], {})
    except BaseException as error:  # the model's code raises whatever it likes
        return f"{type(error).__name__}: {error}"
    return output.getvalue().strip()


async def solve(client: openai.AsyncOpenAI, model: str, prompt: str, turns: int = 3) -> str:
    """The agent: calls tools until the model answers."""
    messages: list = [{"role": "user", "content": prompt}]
    for _ in range(turns):
        completion = await client.chat.completions.create(model=model, messages=messages, tools=[TOOL])  # type: ignore
        message = completion.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            output = run_python(call.function.arguments)  # type: ignore[union-attr]
            messages.append({"role": "tool", "tool_call_id": call.id, "content": output})
    return ""


async def agent(task: Any, access: Any, directory: Any) -> None:
    """One problem, as a function of the trainer's process (agent.harness.function)."""
    async with openai.AsyncOpenAI(base_url=access.url, api_key=access.key) as client:
        await solve(client, access.model, task.messages[-1].content)


async def main() -> None:
    """One problem, as a command."""
    with open(os.environ["TASK_FILE"]) as file:
        prompt = json.load(file)["prompt"]
    async with openai.AsyncOpenAI() as client:  # reads OPENAI_BASE_URL and OPENAI_API_KEY
        print(await solve(client, os.environ["OPENAI_MODEL"], prompt))


if __name__ == "__main__":
    asyncio.run(main())
