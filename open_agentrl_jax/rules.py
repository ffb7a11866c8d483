"""Rules of a config that relate several fields. Limits of single fields stand at the fields, in config.py."""

import re
from collections.abc import Iterator
from typing import Any

from open_agentrl_jax.settings import lookup

NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")  # "module:attribute"
TOOL = re.compile(rf"python|mcp:\s*\S.*|{NAME.pattern}")


def broken_rules(config: Any) -> Iterator[str]:
    """The message of each rule that a config breaks, with field and cure."""
    return (text for broken, text in _rules(config) if broken)


def _rules(config: Any) -> Iterator[tuple[Any, str]]:
    """(whether it is broken, message) of each rule that relates several fields."""
    rl, agent, rollout, packing = config.rl, config.agent, config.rollout, config.packing
    trains_rl, trains_sft = rl.steps or rl.epochs, config.sft.steps or config.sft.epochs
    truncated = trains_rl and (rollout.top_p < 1 or rollout.top_k > 0)
    yield (
        not all(TOOL.fullmatch(str(tool)) for tool in agent.tools),
        f"agent.tools is {agent.tools!r}; give a tuple of 'python', 'mcp:COMMAND' and 'module:factory'",
    )
    yield (
        agent.python.persistent and config.sandbox.urls,
        "agent.python.persistent needs the embedded sandbox; leave sandbox.urls empty, or set it to False",
    )
    harness = agent.harness
    yield (
        harness.command and harness.function,
        "agent.harness.command and agent.harness.function are both set; leave one empty",
    )
    yield (
        (harness.command or harness.function) and agent.environment,
        f"agent.environment={agent.environment} needs the episode loop, which agent.harness replaces; leave one empty",
    )
    for field in ("agent.environment", "agent.harness.function", "reward.grader"):
        name = lookup(config, field)
        yield name and not NAME.fullmatch(name), f"{field} is {name!r}; write 'module:name', or leave it empty"
    yield (
        rl.prompts % rl.mini_batches,
        f"rl.prompts={rl.prompts} is not divisible by rl.mini_batches={rl.mini_batches}; choose a divisor",
    )
    yield config.data.train and config.data.sources, "data.train and data.sources are both set; leave one empty"
    for i, source in enumerate(config.data.sources):
        yield not source.path, f"data.sources[{i}].path is empty; name its problems"
        yield (
            source.max_response > agent.max_response,
            f"data.sources[{i}].max_response={source.max_response} exceeds agent.max_response={agent.max_response}, "
            "which sets the length of rows and caches; raise the latter",
        )
    yield trains_rl and not config.data.problems, "data.train is empty; name the RL problems (a jsonl or parquet file)"
    yield trains_sft and not config.data.sft, "data.sft is empty; name the SFT conversations (a jsonl or parquet file)"
    yield (
        trains_rl and rollout.temperature == 0,
        "rollout.temperature is 0; RL needs sampled tokens, use a temperature above 0",
    )
    yield (
        truncated and rl.loss.old_logprobs == "rollout",
        "rl.loss.old_logprobs=rollout with top-p or top-k uses log-probs of the truncated distribution; "
        "set rl.loss.old_logprobs=trainer, or rollout.top_p=1 and rollout.top_k=0",
    )
    yield (
        truncated and rl.loss.importance_level != "off",
        f"rl.loss.importance_level={rl.loss.importance_level} with top-p or top-k biases the ratio: the engine's "
        "log-probs are of the truncated distribution; set rollout.top_p=1 and rollout.top_k=0, or "
        "rl.loss.importance_level=off",
    )
    yield (
        trains_rl and rl.max_staleness and rl.loss.old_logprobs == "trainer" and rl.loss.importance_level == "off",
        f"rl.max_staleness={rl.max_staleness} trains on tokens of older weights, which biases the gradient; set "
        "rl.loss.importance_level=token (or sequence), or rl.loss.old_logprobs=rollout",
    )
    yield (
        rollout.weights == "int8" and rollout.engine != "local",
        "rollout.weights=int8 needs the embedded engine; set rollout.engine=local, or rollout.weights=same",
    )
    yield (
        trains_rl
        and rollout.weights == "int8"
        and (rl.loss.old_logprobs != "trainer" or rl.loss.importance_level == "off"),
        "rollout.weights=int8 samples from another policy than the trainer's; set rl.loss.old_logprobs=trainer and "
        "rl.loss.importance_level=token (or sequence), or rollout.weights=same",
    )
    lora = config.model.lora
    yield (
        rollout.weights == "merged" and not lora.rank,
        "rollout.weights=merged needs adapters; set model.lora.rank, or rollout.weights=same",
    )
    yield (
        not lora.rank and (lora.adapter or lora.base != "same"),
        "model.lora.rank is 0, which switches adapters off; set it, or reset model.lora.adapter and model.lora.base",
    )
    yield (
        config.reward.overlong_buffer > agent.max_response,
        f"reward.overlong_buffer={config.reward.overlong_buffer} exceeds agent.max_response={agent.max_response}; "
        "lower it, or set 0 to switch it off",
    )
    yield (
        rollout.engine == "sglang" and not (rollout.servers or rollout.launch_servers),
        "rollout.engine=sglang needs rollout.servers (base URLs) or rollout.launch_servers (how many to start)",
    )
    yield (
        trains_rl and 0 < packing.length < agent.max_prompt + agent.max_response,
        f"packing.length={packing.length} cannot hold agent.max_prompt + agent.max_response = "
        f"{agent.max_prompt + agent.max_response}; raise it, or set 0 to derive it",
    )
    yield (
        not (config.model.path or config.model.tokenizer)
        and config.data.problems not in ("", "arithmetic", "multistep"),
        "model.tokenizer is empty; a new model on real problems needs one (a folder with tokenizer.json)",
    )
