"""The whole configuration: nested, typed, mutable dataclasses, read by ml_collections (`--config.rl.steps=10`).

A file in configs/ returns one `Config`; `validate` refuses what cannot work before anything is built. Lengths are
tokens, times are seconds. This file imports nothing of ours. (No postponed annotations: ml_collections reads the
field types.)
"""

import dataclasses
import json
import re
from typing import Any


@dataclasses.dataclass
class NewModel:
    """A seed-initialised model, written as a Hugging Face folder to `<run_dir>/init` and loaded from there."""

    model_type: str = "qwen3"  # "qwen3" | "qwen2"
    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 256
    vocab_size: int = 0  # 0: the tokenizer's, rounded up to a multiple of 64
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True


@dataclasses.dataclass
class Model:
    """The policy."""

    path: str = ""  # a Hugging Face folder or Hub id; empty: `new` is created
    tokenizer: str = ""  # empty: the folder of `path`, or one trained on the synthetic corpus for a `new` model
    compute_dtype: str = "auto"  # "auto" (bfloat16 on an accelerator, float32 on CPU) | "float32" | "bfloat16"
    remat: str = "none"  # a name of models.qwen's table of rematerialisation policies
    attention: str = "auto"  # "auto" (by platform, shape and dtype) or a name of models.attention's table of backends
    new: NewModel = dataclasses.field(default_factory=NewModel)


@dataclasses.dataclass
class Data:
    """Where problems come from; `train` and `eval` must have no problem in common."""

    train: str = ""  # "arithmetic" (generated), a jsonl / parquet file, or several by weight: "a.parquet:3,b.jsonl:1"
    eval: str = ""  # "arithmetic" or one file, for the held-out problems; empty: no evaluation
    sft: str = ""  # conversations: "arithmetic", or as `train` but with `messages`
    format: str = "auto"  # a name of data.prompts' table of row formats, or "module:function" from a row to a Problem
    eval_limit: int = 0  # 0: all
    data_dir: str = ""  # where files are prepared once, as array_record (TFDS); empty: they are read at every start


@dataclasses.dataclass
class Optim:
    """AdamW with a schedule."""

    lr: float = 1e-6
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    schedule: str = "constant"  # "constant" | "cosine"
    warmup: float = 0.0  # share of the steps (below 1) or a number of steps
    offload: bool = False  # moments lie in host memory; a parameter's are on the device for its own update only


@dataclasses.dataclass
class SFT:
    """The warm start."""

    steps: int = 0  # optimizer steps; 0 with `epochs` > 0: as many as the epochs take
    epochs: int = 0
    batch_size: int = 32  # conversations a step
    max_length: int = 32768  # right truncation
    optim: Optim = dataclasses.field(default_factory=lambda: Optim(lr=1e-5, b2=0.95, schedule="cosine", warmup=0.1))


@dataclasses.dataclass
class Loss:
    """GRPO-TCR and its ablations; formulas in algorithms/losses.py."""

    policy: str = "clip"  # "clip" | "clip_cov" | "kl_cov"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 10.0  # 0: off
    ratio: str = "token"  # "token" | "sequence" (GSPO)
    aggregate: str = "token-mean"
    normalize_std: bool = True  # False: Dr.GRPO
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    entropy_coef: float = 0.0
    entropy_target: float = 0.0  # > 0: a controller moves the coefficient to hold this entropy (nats)
    old_logprobs: str = "trainer"  # "trainer": recomputed before the updates | "rollout": the engine's, as sampled
    importance_level: str = "off"  # truncated importance sampling: "off" | "token" | "sequence"
    importance_mode: str = "clip"  # "clip" | "mask"
    importance_cap: float = 2.0


@dataclasses.dataclass
class RL:
    """The reinforcement phase."""

    steps: int = 0  # one step: `prompts` x `samples` trajectories; 0 with `epochs` > 0: as many as the epochs take
    epochs: int = 0
    prompts: int = 64
    samples: int = 16
    mini_batches: int = 4  # optimizer updates a step
    max_staleness: int = 0  # 0: synchronous
    filter_groups: bool = False  # refill groups whose raw accuracies are all equal
    min_accuracy: float = 0.0  # accuracy after SFT below which RL is not started: it would collapse
    logprob_tolerance: float = 0.1  # nats a token between engine and trainer, the mean of a step, above which it warns
    loss: Loss = dataclasses.field(default_factory=Loss)
    optim: Optim = dataclasses.field(default_factory=Optim)


@dataclasses.dataclass
class Packing:
    """Rows of the train step: `rows` x `length` tokens are one micro-batch."""

    rows: int = 8  # over the whole mesh; a multiple of data x fsdp of the mesh; 0: one for each of them
    length: int = 0  # a multiple of the mesh's seq x tensor; 0: prompt + response budget (RL), max_length (SFT)


@dataclasses.dataclass
class Agent:
    """What the model may call, and the budgets of an episode."""

    tools: tuple = ("python",)  # "python" | "mcp:COMMAND" (a stdio MCP server) | "module:factory" (makes a Tool)
    environment: str = ""  # "module:factory" of an Environment; empty: `tools` and the grader (ToolEnvironment)
    call_seconds: float = 60.0  # of one call of an MCP tool; Python's are sandbox.timeout
    max_turns: int = 16  # assistant turns
    max_prompt: int = 2560  # tool schemas included; longer prompts are dropped and counted
    max_response: int = 20480  # all after the prompt, tool tokens included
    max_tool_tokens: int = 2048  # of one tool output; the middle is cut and the cut is said
    seconds: float = 1800.0  # of one episode


@dataclasses.dataclass
class Reward:
    """Grading and shaping."""

    grader: str = ""  # "module:function" of (task, text) -> Score; empty: by the problem's kind (rewards/graders.py)
    turn_bonus: str = "off"  # "off" | "paper" | "reference"
    overlong_buffer: int = 4096  # 0: off
    overlong_factor: float = 1.0
    count_tool_tokens: bool = True  # in the length that the overlong penalty sees


@dataclasses.dataclass
class Sandbox:
    """The Python tool."""

    urls: tuple = ()  # SandboxFusion servers; empty: the embedded sandbox
    timeout: float = 30.0
    memory_mb: int = 2048
    max_active: int = 0  # runs at once; 0: twice the cores (embedded), 128 (remote)
    unsafe_no_isolation: bool = False


@dataclasses.dataclass
class Rollout:
    """Generation."""

    engine: str = "local"  # "local" | "sglang"
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    slots: int = 64  # local: sequences in the KV cache
    decode_chunk: int = 16  # local: tokens decoded a dispatch
    weights: str = "same"  # local: "same" as the trainer's | "int8": of 8 bits, another policy (docs/scaling.md)
    concurrency: int = 0  # episodes at once; 0: `slots` (local), 256 a server (sglang)
    servers: tuple = ()  # sglang: base URLs
    launch_servers: int = 0  # sglang: servers this run starts and stops itself
    weights_dir: str = ""  # sglang: a path that all servers see; empty: <run_dir>/weights
    deadline: float = 600.0  # sglang: seconds of one request


@dataclasses.dataclass
class Eval:
    """Held-out accuracy."""

    every: int = 0  # RL steps; 0: only before and after RL
    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0


@dataclasses.dataclass
class Checkpoint:
    """What is kept."""

    every: int = 30  # steps
    keep: int = 3
    keep_best: bool = False  # also the one of the best evaluation
    copy_to: str = ""  # gs://, s3:// or a folder: checkpoints and export go there too; a new machine goes on from it


@dataclasses.dataclass
class Mesh:
    """Devices an axis; -1: all that remain."""

    data: int = 1  # copies of the parameters; the batch is split over it
    fsdp: int = -1  # parts of the parameters; the batch is split over it too
    seq: int = 1  # parts of each row and of the vocabulary (context parallelism)
    tensor: int = 1  # parts of heads, hidden units and vocabulary


@dataclasses.dataclass
class Telemetry:
    """metrics.jsonl and trajectories.jsonl are always written."""

    tensorboard: bool = False
    wandb_project: str = ""


@dataclasses.dataclass
class Config:
    """One experiment."""

    name: str = "run"
    run_dir: str = ""  # empty: runs/<name>
    seed: int = 0
    behaviour: str = "robust"  # "robust" | "reference": what the reference code computes, its faults included
    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    sft: SFT = dataclasses.field(default_factory=SFT)
    rl: RL = dataclasses.field(default_factory=RL)
    packing: Packing = dataclasses.field(default_factory=Packing)
    agent: Agent = dataclasses.field(default_factory=Agent)
    reward: Reward = dataclasses.field(default_factory=Reward)
    sandbox: Sandbox = dataclasses.field(default_factory=Sandbox)
    rollout: Rollout = dataclasses.field(default_factory=Rollout)
    eval: Eval = dataclasses.field(default_factory=Eval)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    telemetry: Telemetry = dataclasses.field(default_factory=Telemetry)

    @property
    def directory(self) -> str:
        """The run directory."""
        return self.run_dir or f"runs/{self.name}"


CHOICES = {
    "behaviour": ("robust", "reference"),
    "model.compute_dtype": ("auto", "float32", "bfloat16"),
    "model.new.model_type": ("qwen3", "qwen2"),
    "sft.optim.schedule": ("constant", "cosine"),
    "rl.optim.schedule": ("constant", "cosine"),
    "rl.loss.policy": ("clip", "clip_cov", "kl_cov"),
    "rl.loss.ratio": ("token", "sequence"),
    "rl.loss.aggregate": ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
    "rl.loss.kl_kind": ("k1", "abs", "k2", "k3"),
    "rl.loss.old_logprobs": ("trainer", "rollout"),
    "rl.loss.importance_level": ("off", "token", "sequence"),
    "rl.loss.importance_mode": ("clip", "mask"),
    "reward.turn_bonus": ("off", "paper", "reference"),
    "rollout.engine": ("local", "sglang"),
    "rollout.weights": ("same", "int8"),
}

AT_LEAST = {
    1: """
        rl.prompts rl.samples rl.mini_batches sft.batch_size sft.max_length
        agent.max_turns agent.max_prompt agent.max_response agent.max_tool_tokens rollout.slots rollout.decode_chunk
        eval.samples checkpoint.every checkpoint.keep sandbox.memory_mb
    """,
    0: """
        seed sft.steps sft.epochs sft.optim.lr rl.steps rl.epochs rl.optim.lr rl.max_staleness rl.logprob_tolerance
        rl.loss.clip_low rl.loss.clip_high rl.loss.dual_clip reward.overlong_buffer rollout.top_k rollout.temperature
        packing.rows rollout.launch_servers eval.every eval.temperature agent.call_seconds
    """,
}


NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")  # "module:attribute"
TOOL = re.compile(rf"python|mcp:\s*\S.*|{NAME.pattern}")


def lookup(config: Any, field: str) -> Any:
    """The value of a dotted field."""
    for part in field.split("."):
        config = getattr(config, part)
    return config


def validate(config: Config) -> list[str]:
    """What is wrong, one line each, field and cure named; empty when all is well."""
    problems = [
        f"{field} is {lookup(config, field)!r}; use one of {', '.join(allowed)}"
        for field, allowed in CHOICES.items()
        if lookup(config, field) not in allowed
    ]
    problems += [
        f"{field} is {lookup(config, field)!r}; it must be at least {least}"
        for least, fields in AT_LEAST.items()
        for field in fields.split()
        if lookup(config, field) < least
    ]
    if problems:
        return problems
    rl, sft = config.rl, config.sft
    trains_rl, trains_sft = rl.steps or rl.epochs, sft.steps or sft.epochs
    named = {field: lookup(config, field) for field in ("agent.environment", "reward.grader")}
    rules = [
        (
            isinstance(config.agent.tools, str) or not all(TOOL.fullmatch(str(tool)) for tool in config.agent.tools),
            f"agent.tools is {config.agent.tools!r}; give a tuple of 'python', 'mcp:COMMAND' and 'module:factory'",
        ),
        *(
            (name and not NAME.fullmatch(name), f"{field} is {name!r}; write 'module:name', or leave it empty")
            for field, name in named.items()
        ),
        (
            rl.prompts % rl.mini_batches,
            f"rl.prompts={rl.prompts} does not divide by rl.mini_batches={rl.mini_batches}; choose a divisor of it",
        ),
        (trains_rl and not config.data.train, "data.train is empty; name the RL problems (a jsonl or parquet file)"),
        (trains_sft and not config.data.sft, "data.sft is empty; name the SFT conversations (a jsonl or parquet file)"),
        (not 0 < config.rollout.top_p <= 1, f"rollout.top_p={config.rollout.top_p}; it must be above 0 and at most 1"),
        (not 0 < config.eval.top_p <= 1, f"eval.top_p={config.eval.top_p}; it must be above 0 and at most 1"),
        (
            trains_rl and (config.rollout.temperature <= 0),
            "rollout.temperature is 0; RL needs sampled tokens, use a temperature above 0",
        ),
        (
            trains_rl and (config.rollout.top_p < 1 or config.rollout.top_k > 0) and rl.loss.old_logprobs == "rollout",
            "rl.loss.old_logprobs=rollout with top-p or top-k: their log-probs are of another distribution; "
            "set rl.loss.old_logprobs=trainer",
        ),
        (
            config.rollout.weights == "int8" and config.rollout.engine != "local",
            "rollout.weights=int8 is of the embedded engine; set rollout.engine=local, or rollout.weights=same",
        ),
        (
            trains_rl
            and config.rollout.weights == "int8"
            and (rl.loss.old_logprobs != "trainer" or rl.loss.importance_level == "off"),
            "rollout.weights=int8 samples from another policy than the trainer's; set rl.loss.old_logprobs=trainer and "
            "rl.loss.importance_level=token (or sequence), or rollout.weights=same",
        ),
        (
            config.reward.overlong_buffer > config.agent.max_response,
            f"reward.overlong_buffer={config.reward.overlong_buffer} exceeds agent.max_response="
            f"{config.agent.max_response}; make it smaller, or 0 to switch it off",
        ),
        (
            config.rollout.engine == "sglang" and not (config.rollout.servers or config.rollout.launch_servers),
            "rollout.engine=sglang needs rollout.servers (base URLs) or rollout.launch_servers (how many to start)",
        ),
        (
            trains_rl and 0 < config.packing.length < config.agent.max_prompt + config.agent.max_response,
            f"packing.length={config.packing.length} cannot hold agent.max_prompt + agent.max_response = "
            f"{config.agent.max_prompt + config.agent.max_response}; raise it, or 0 to derive it",
        ),
        (
            not (config.model.path or config.model.tokenizer) and config.data.train not in ("", "arithmetic"),
            "model.tokenizer is empty; a new model on real problems needs one (a folder with tokenizer.json)",
        ),
    ]
    return [text for broken, text in rules if broken]


# What may differ between a run and its continuation.
RESUMABLE = (
    "rl.steps",
    "rl.epochs",
    "sft.steps",
    "sft.epochs",
    "run_dir",
    "data.data_dir",
    "mesh",
    "packing",
    "sft.optim.offload",
    "rl.optim.offload",
    "checkpoint",
    "telemetry",
    "rollout.servers",
)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionaries."""
    return dataclasses.asdict(config)


def fingerprint(config: Config) -> str:
    """A canonical text of all fields that a continued run must share with the run it continues."""
    tree = to_dict(config)
    for field in RESUMABLE:
        *parents, leaf = field.split(".")
        node = tree
        for part in parents:
            node = node[part]
        node.pop(leaf)
    return json.dumps(tree, sort_keys=True)
