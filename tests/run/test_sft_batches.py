"""From the SFT parquet to the rows of a batch: the very strings that train, however they are packed or cut."""

import itertools
import pathlib

import pytest

from configs import quickstart
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.data import synthetic
from open_agentrl_jax.data.conversations import Conversation, read_conversations, write_conversations
from open_agentrl_jax.run import inputs
from open_agentrl_jax.train.packing import most_micro_batches, pack
from open_agentrl_jax.types import Message, ToolCall, UserError

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data" / "qwen3-tokenizer"
CALLS = [ToolCall(PythonTool.name, {"code": f"print({a} + 2)"}) for a in (1, 7)]
PARALLEL = [
    Message("system", "Be brief."),
    Message("user", "Ada has 1 card, Ben 7, and each finds 2 more. How many now?"),
    Message("assistant", "I add.", CALLS),
    Message("tool", "3"),
    Message("tool", "9"),
    Message("assistant", "The answer is \\boxed{12}."),
]
PLAIN = [Message("user", "1 + 1?"), Message("assistant", "\\boxed{2}")]
TURNS = [
    'I add.\n<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "print(1 + 2)"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "print(7 + 2)"}}\n</tool_call><|im_end|>',
    "The answer is \\boxed{12}.<|im_end|>",
]


@pytest.fixture(scope="module")
def chat():
    return Chat(synthetic.train_tokenizer(synthetic.corpus(0, 300)), [PythonTool.schema])


def examples(chat, tmp_path, *conversations, max_length=1000, behaviour="robust"):
    """As launch.sft makes them, through the file."""
    config = quickstart.get_config()
    config.sft.max_length, config.behaviour = max_length, behaviour
    made = [Conversation(str(i), messages, [PythonTool.schema], "s") for i, messages in enumerate(conversations)]
    write_conversations(tmp_path / "sft.parquet", made)
    return inputs.sft_examples(config, chat, read_conversations(tmp_path / "sft.parquet"))


def trained(chat, batch):
    """The strings whose tokens are targets of the loss, in the order of rows."""
    strings = []
    for targets, mask in zip(
        batch.targets.reshape(-1, batch.targets.shape[-1]), batch.mask.reshape(-1, batch.mask.shape[-1]), strict=True
    ):
        for trains, group in itertools.groupby(zip(targets, mask, strict=True), key=lambda pair: bool(pair[1])):
            if trains:
                strings.append(chat.tokenizer.decode([int(token) for token, _ in group]))
    return strings


def packed(made, *, rows=1, length=1000):
    batch, used = pack(made, rows=rows, length=length, micro_batches=most_micro_batches(len(made), rows))
    assert used >= 1
    return batch


def test_the_strings_that_train_are_the_assistants_turns_and_nothing_else(chat, tmp_path):
    assert trained(chat, packed(examples(chat, tmp_path, PARALLEL))) == TURNS


def test_results_of_one_turn_are_grouped_by_the_template(chat, tmp_path):
    text = chat.tokenizer.decode(examples(chat, tmp_path, PARALLEL)[0].tokens)
    between = text.partition(TURNS[0])[2].partition(TURNS[1])[0]
    assert between == (
        "\n<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n9\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(("rows", "length"), [(1, 400), (2, 300), (4, 260)])
def test_packing_changes_no_string(chat, tmp_path, rows, length):
    made = examples(chat, tmp_path, PARALLEL, PLAIN, PARALLEL, PLAIN)
    expected = sorted([*TURNS, "\\boxed{2}<|im_end|>"] * 2)
    assert sorted(trained(chat, packed(made, rows=rows, length=length))) == expected


def test_cut_on_the_right_what_is_left_is_what_stood_there(chat, tmp_path):
    (whole,) = examples(chat, tmp_path, PARALLEL)
    spoken = "".join(TURNS)
    for length in range(int(whole.mask.argmax()) + 1, len(whole.tokens) + 1):
        (cut,) = examples(chat, tmp_path, PARALLEL, max_length=length)
        assert (cut.tokens == whole.tokens[:length]).all() and (cut.mask == whole.mask[:length]).all()
        strings = "".join(trained(chat, packed([cut])))
        assert spoken.startswith(strings.rstrip("\ufffd")) and strings


def test_the_reference_never_trains_the_first_token_and_trains_the_one_after(chat, tmp_path):
    """Fault 2: its mask sits one token too late."""
    strings = trained(chat, packed(examples(chat, tmp_path, PLAIN, behaviour="reference")))
    assert strings == ["boxed{2}<|im_end|>\n"]


@pytest.mark.skipif(not SHARED.exists(), reason="the real Qwen3 tokenizer is not part of the project")
def test_the_real_qwen3_template_trains_the_same_strings(tmp_path):
    from transformers import AutoTokenizer

    real = Chat(AutoTokenizer.from_pretrained(SHARED), [PythonTool.schema])
    strings = trained(real, packed(examples(real, tmp_path, PARALLEL)))
    assert [s.removeprefix("<think>\n\n</think>\n\n") for s in strings] == TURNS


def test_one_conversation_that_the_template_cannot_render_is_skipped_and_named(chat, tmp_path, caplog):
    twice = [PLAIN[0], PLAIN[1]]
    bad = Chat(chat.tokenizer, chat.tools)
    whole = bad.conversation

    def conversation(messages, tools=None):
        if messages[0].content == "odd":
            raise ValueError("2 assistant messages were rendered as 1 turns")
        return whole(messages, tools)

    bad.conversation = conversation
    odd = [Message("user", "odd"), PLAIN[1]]
    assert len(examples(bad, tmp_path, twice, odd, twice)) == 2
    assert "conversation s/1: 2 assistant messages were rendered as 1 turns" in caplog.text
    with pytest.raises(UserError, match=r"data\.sft: 2 of 3 rows are bad, .* see the tokenizer's chat template"):
        examples(bad, tmp_path, odd, odd, twice)


def test_a_row_shows_its_own_tools_and_its_lost_reasoning_is_counted(chat, caplog):
    config = quickstart.get_config()
    search = {"type": "function", "function": {"name": "search", "parameters": {"properties": {"query": {}}}}}
    thought = [PLAIN[0], Message("assistant", "2", reasoning="because")]
    made = inputs.sft_examples(config, chat, [Conversation("a", PLAIN, [search]), Conversation("b", thought)])
    texts = [chat.tokenizer.decode(one.tokens) for one in made]
    assert "search(query)" in texts[0] and "code_interpreter" not in texts[0] and "code_interpreter" in texts[1]
    assert "leaves out the reasoning_content of 1 conversations" in caplog.text
