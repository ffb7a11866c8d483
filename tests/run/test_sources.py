"""Several environments in one run: each row of `data.sources` is played with its own tools, grader and budgets."""

import json

import pytest

from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.environment import Step
from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.config import Agent, Config, Data, Harness, Reward, Source, row_config, to_dict, validate
from open_agentrl_jax.run import inputs
from open_agentrl_jax.run.players import player_of
from open_agentrl_jax.run.world import open_world
from open_agentrl_jax.types import Message, Sampling, Score
from tests.serve.speaker import Speaker


class Echo:
    """An environment without tools that rewards a word."""

    def __init__(self, tools, reward, *, shorten=str, session=""):
        self.tools, self._asked = [], 0

    async def reset(self, task):
        return task.messages

    async def step(self, message):
        self._asked += 1
        if self._asked < 2:
            return Step([Message("user", "Again?")])
        return Step([], 0.5, True, float("word" in message.content))

    async def close(self): ...


async def always_right(task, text):
    return Score(2.0, 1.0, text)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "riddles.jsonl").write_text(json.dumps({"problem": "Say a word.", "answer": "word"}) + "\n")
    sources = (
        Source("arithmetic", weight=3.0, max_turns=1),
        Source(str(tmp_path / "riddles.jsonl"), environment="tests.run.test_sources:Echo", max_response=20),
        Source("arithmetic", name="easy", tools=(), grader="tests.run.test_sources:always_right"),
    )
    return Config(
        data=Data(sources=sources),
        agent=Agent(max_turns=3, max_prompt=300, max_response=100),
        reward=Reward(overlong_buffer=0),
    )


async def test_each_row_has_its_environment_tools_grader_and_budgets(config, tokenizer):
    world = open_world(config)
    chat = Chat(tokenizer, world.schemas)
    mixture, _ = inputs.training_problems(config, chat, [row.schemas for row in world.rows])
    assert [len(row.schemas) for row in world.rows] == [1, 0, 0] and world.rows[0].sandbox is world.sandbox
    assert mixture.weights == [3.0, 1.0, 1.0]
    said = "It is a word."
    engine = Speaker(chat, *[said] * 4)
    play = player_of(config, engine, chat, world, Sampling(0), "rl")
    made = []
    for source in mixture.sources:
        task = source[0]
        made.append((task.extra["row_name"], await play(task, position=0, sample=0, attempt=0)))
    await world.close()
    assert [name for name, _ in made] == ["arithmetic", "riddles", "easy"]
    plain, echo, easy = (trajectory for _, trajectory in made)
    assert (plain.stop, plain.reward, len(plain.turns)) == ("answer", -1.0, 1)
    assert (echo.reward, len(echo.turns)) == (0.5, 2) or echo.stop == "length"
    assert (easy.reward, easy.accuracy) == (2.0, 1.0)
    prompts = [chat.decode(t.tokens[: int(t.metrics["prompt_length"])].tolist()) for t in (plain, echo, easy)]
    assert [PythonTool.name in prompt for prompt in prompts] == [True, False, False]


def test_a_row_inherits_what_it_leaves_out_and_replaces_the_rest(config):
    config.agent.environment, config.agent.seconds = "mine:make", 9.0
    first, second, third = (row_config(config, source) for source in config.data.sources)
    assert (first.agent.environment, first.agent.max_turns, first.agent.seconds) == ("mine:make", 1, 9.0)
    assert (second.agent.environment, second.agent.max_response) == ("tests.run.test_sources:Echo", 20)
    assert third.agent.tools == () and first.agent.tools == ("python",)
    harness = row_config(config, Source("a.jsonl", harness=Harness(command="python agent.py")))
    assert harness.agent.environment == "" and harness.agent.harness.command == "python agent.py"
    assert to_dict(config)["data"]["sources"][0]["path"] == "arithmetic"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.data, "train", "a.jsonl"), "data.train and data.sources are both set"),
        (lambda c: setattr(c.data.sources[1], "max_response", 999), r"data.sources\[1\].max_response=999 exceeds"),
        (lambda c: setattr(c.data.sources[0], "weight", 0.0), r"data.sources\[0\].weight is 0.0; it must be above 0"),
        (lambda c: setattr(c.data.sources[2], "grader", "x"), r"data.sources\[2\]: reward.grader is 'x'"),
        (lambda c: setattr(c.data, "sources", ("a.jsonl",)), "other than Source"),
    ],
)
def test_a_wrong_row_is_named(config, change, message):
    config.rl.steps, config.model.tokenizer = 1, "x"
    assert not validate(config)
    change(config)
    with pytest.raises(AssertionError, match=message):
        assert not validate(config), "\n".join(validate(config))
