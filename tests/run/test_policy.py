"""The template of a run's tokenizer: replaced where the config names another one, and carried by exports."""

import copy
import json

import pytest

from configs import quickstart
from open_agentrl_jax.agent import templates
from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.run import doctor
from open_agentrl_jax.run.policy import load_policy, load_tokenizer, make_chat, open_folder
from open_agentrl_jax.types import UserError

BARE = (  # the shape of SmolLM2's: ChatML that knows nothing of tools
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_without_tools_is_refused_and_own_replaces_it(tokenizer, tmp_path):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = BARE
    plain.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    config = quickstart.get_config()
    config.model.path = str(tmp_path / "model")
    folder = open_folder(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"ignores the tools; set model\.template=own"):
        make_chat(config, folder.tokenizer, [PythonTool.schema])
    config.model.template = "own"
    folder = open_folder(config, tmp_path / "run")
    assert folder.path == tmp_path / "model" and folder.tokenizer_path == tmp_path / "run" / "tokenizer"
    assert make_chat(config, folder.tokenizer, [PythonTool.schema]).call_format == "hermes"
    assert (folder.tokenizer_path / "generation_config.json").exists()
    assert load_tokenizer(str(folder.tokenizer_path))[1].chat_template == templates.CHATML


def test_a_gguf_file_becomes_the_initial_folder_of_the_run(tmp_path):
    library = pytest.importorskip("gguf")
    from ..models import test_gguf, tiny

    assert library
    tokenizer = test_gguf.trained_tokenizer("smollm")
    model = tiny.torch_model("llama", hidden_size=256, vocab_size=tokenizer.get_vocab_size())
    test_gguf.write(tmp_path / "model.gguf", model, tokenizer, types=("F16",))
    config = quickstart.get_config()
    config.model.path, config.model.template = str(tmp_path / "model.gguf"), "own"
    folder = open_folder(config, tmp_path / "run")
    assert folder.path == tmp_path / "run" / "init"
    assert load_policy(config, folder).config.model_type == "llama"
    assert make_chat(config, folder.tokenizer, [PythonTool.schema]).call_format == "hermes"
    before = (folder.path / "model.safetensors").stat().st_mtime_ns
    assert open_folder(config, tmp_path / "run").path == folder.path
    assert (folder.path / "model.safetensors").stat().st_mtime_ns == before, "a resumed run converts again"
    assert doctor.tokenizer(config).endswith("with its tools")
