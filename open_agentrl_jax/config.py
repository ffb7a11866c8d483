"""The configuration of a run: nested, typed, mutable dataclasses, read by ml_collections (`--config.rl.steps=10`).

A file in configs/ returns one `Config`. Each field states its default, meaning and limits once (see settings.py);
`validate` checks them before anything is built, and docs/config.md is generated from them. Lengths are in tokens, times
in seconds. There are no postponed annotations, because ml_collections reads the field types.
"""

import copy
import dataclasses
import re

from open_agentrl_jax.rules import NAME as NAME
from open_agentrl_jax.rules import broken_rules
from open_agentrl_jax.settings import expand_home as expand_home
from open_agentrl_jax.settings import fault, section, setting, settings
from open_agentrl_jax.settings import fingerprint as fingerprint
from open_agentrl_jax.settings import lookup as lookup
from open_agentrl_jax.settings import to_dict as to_dict


@dataclasses.dataclass
class NewModel:
    """A randomly initialised model, written as a Hugging Face folder to `<run_dir>/init` and loaded from there."""

    model_type: str = setting("qwen3", choices=("qwen3", "qwen2"))
    hidden_size: int = setting(128, at_least=1)
    num_layers: int = setting(3, at_least=1)
    num_heads: int = setting(4, at_least=1)
    num_kv_heads: int = setting(2, at_least=1)
    head_dim: int = setting(32, at_least=2)
    intermediate_size: int = setting(256, at_least=1)
    vocab_size: int = setting(0, "0: the tokenizer's size, rounded up to a multiple of 64")
    max_position_embeddings: int = setting(32768, at_least=1)
    rope_theta: float = setting(1e6, above=0)
    initializer_range: float = setting(0.02)
    tie_word_embeddings: bool = setting(True)


@dataclasses.dataclass
class LoRA:
    """Low-rank adapters; with them all other weights are frozen in the compute dtype (docs/models.md)."""

    rank: int = setting(0, "0: off, all weights are trained")
    alpha: float = setting(32.0, "adapters are scaled by alpha / rank", above=0)
    targets: tuple = setting((), 'module names, as in ("q_proj", "v_proj"); empty: every matrix of the layers')
    rslora: bool = setting(False, "scale by alpha / sqrt(rank)")
    base: str = setting("same", "int8: hold the frozen matrices of the layers in 8 bits", choices=("same", "int8"))
    adapter: str = setting("", "a PEFT folder to continue from; empty: new adapters", path=True)


@dataclasses.dataclass
class Model:
    """The policy."""

    path: str = setting(
        "", "a Hugging Face folder, Hub id or GGUF file; empty: create the model of `model.new`", path=True
    )
    tokenizer: str = setting(
        "", "empty: the one in `path`, or, for a new model, one trained on the synthetic corpus", path=True
    )
    template: str = setting(
        "auto",
        "chat template; auto: the tokenizer's, own: ChatML with Hermes tool calls, else a template file",
        path=True,
    )
    compute_dtype: str = setting(
        "auto", "auto: bfloat16 where the accelerator has it, else float32", choices=("auto", "float32", "bfloat16")
    )
    reduce_dtype: str = setting("float32", "of gradients summed between devices", choices=("compute", "float32"))
    remat: str = setting("none", "a rematerialisation policy of models.qwen")
    attention: str = setting("auto", "a backend of models.attention; auto: by platform, shape and dtype")
    balance: float = setting(
        0.0, "mixtures of experts: weight of the load-balance loss; 0: neither the loss nor its metrics", at_least=0
    )
    new: NewModel = section(NewModel)
    lora: LoRA = section(LoRA)


@dataclasses.dataclass
class Harness:
    """Somebody else's agent in place of the episode loop; see docs/harness.md."""

    command: str = setting("", "command line of an agent that speaks the OpenAI chat API; empty: the episode loop")
    function: str = setting("", '"module:function" of an async agent in place of `command`, which runs in this process')
    variables: tuple = setting((), "environment variables that the command inherits")
    max_tokens: int = setting(0, "sampled tokens per episode, all its sequences together; 0: no limit of its own")


@dataclasses.dataclass
class Source:
    """One row of `data.sources`: problems, and what plays them. Empty fields and 0 take the value of the run.

    A row that names an environment or a harness takes neither from the run.
    """

    path: str = setting("", "as in `data.train`", path=True)
    name: str = setting("", "in metrics and trajectories; empty: the file's name")
    weight: float = setting(1.0, "share of the prompts relative to the other rows", above=0)
    environment: str = setting("", "in place of `agent.environment`")
    harness: Harness = section(Harness)
    tools: tuple = setting(("run",), 'in place of `agent.tools`; "run": those of the run')
    grader: str = setting("", "in place of `reward.grader`")
    max_turns: int = setting(0, "in place of `agent.max_turns`")
    max_response: int = setting(0, "in place of `agent.max_response`, and at most as large")
    seconds: float = setting(0.0, "in place of `agent.seconds`")

    @property
    def label(self) -> str:
        """The name in metrics."""
        return self.name or re.sub(r"\W+", "_", self.path.rpartition("/")[2].partition(".")[0])


@dataclasses.dataclass
class Data:
    """Problems and conversations; `train` and `eval` must have no problem in common."""

    train: str = setting(
        "",
        '"arithmetic" or "multistep" (generated), a jsonl or parquet file, or a weighted mixture: '
        '"a.parquet:3,b.jsonl:1"',
        path=True,
    )
    sources: tuple = setting((), "in place of `train`: a tuple of Source, each with an environment of its own")
    eval: str = setting("", "held-out problems: generated, or one file; empty: no evaluation", path=True)
    sft: str = setting("", "conversations: generated, or files as in `train`, with a `messages` column", path=True)
    format: str = setting("auto", 'a row format of data.prompts, or "module:function" from a row to a Problem')
    eval_limit: int = setting(0, "use only the first problems of `eval`; 0: all")
    data_dir: str = setting(
        "",
        "cache of prepared files (TFDS, array_record); empty: files are read at every start",
        path=True,
        resumable=True,
    )

    @property
    def problems(self) -> str:
        """The problems of RL in the form of `train`, whether they are given there or in `sources`."""
        return self.train or ",".join(f"{source.path}:{source.weight:g}" for source in self.sources)


@dataclasses.dataclass
class Optim:
    """AdamW with a schedule."""

    lr: float = setting(1e-6)
    b1: float = setting(0.9, below=1)
    b2: float = setting(0.999, below=1)
    weight_decay: float = setting(0.01)
    clip_norm: float = setting(1.0, "global gradient norm above which the gradient is scaled down", above=0)
    schedule: str = setting("constant", choices=("constant", "cosine"))
    warmup: float = setting(0.0, "below 1: share of the updates; else: number of updates")
    offload: bool = setting(
        False,
        "keep the moments in host memory; each is on the device only while its parameter is updated",
        resumable=True,
    )


@dataclasses.dataclass
class SFT:
    """Supervised fine-tuning, the warm start."""

    steps: int = setting(0, "optimizer steps; 0: as many as `epochs` takes", resumable=True)
    epochs: int = setting(0, resumable=True)
    batch_size: int = setting(32, "conversations per step", at_least=1)
    max_length: int = setting(32768, "longer conversations are truncated on the right", at_least=1)
    optim: Optim = section(lambda: Optim(lr=1e-5, b2=0.95, schedule="cosine", warmup=0.1))


@dataclasses.dataclass
class Loss:
    """GRPO-TCR and its ablations; algorithms/losses.py has the formulas."""

    policy: str = setting("clip", choices=("clip", "clip_cov", "kl_cov"))
    clip_low: float = setting(0.2)
    clip_high: float = setting(0.28)
    dual_clip: float = setting(10.0, "0: off")
    ratio: str = setting("token", "sequence: GSPO", choices=("token", "sequence"))
    aggregate: str = setting(
        "token-mean", choices=("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
    )
    normalize_std: bool = setting(True, "divide advantages by the group's standard deviation; False: Dr.GRPO")
    turn_credit: float = setting(
        0.0, "weight of advantages per turn, from rewards of an environment's steps; 0: off (docs/extending.md)"
    )
    kl_coef: float = setting(0.0)
    kl_kind: str = setting("k3", choices=("k1", "abs", "k2", "k3"))
    entropy_coef: float = setting(0.0)
    entropy_target: float = setting(0.0, "nats; above 0: adapt the entropy coefficient to hold this entropy")
    old_logprobs: str = setting(
        "trainer", "trainer: recompute before the updates; rollout: use the engine's", choices=("trainer", "rollout")
    )
    importance_level: str = setting("off", "truncated importance sampling", choices=("off", "token", "sequence"))
    importance_mode: str = setting("clip", choices=("clip", "mask"))
    importance_cap: float = setting(2.0, above=0)


@dataclasses.dataclass
class RL:
    """The reinforcement learning phase."""

    steps: int = setting(
        0, "a step takes `prompts` x `samples` trajectories; 0: as many as `epochs` takes", resumable=True
    )
    epochs: int = setting(0, resumable=True)
    prompts: int = setting(64, "problems per step", at_least=1)
    samples: int = setting(16, "trajectories per problem", at_least=1)
    mini_batches: int = setting(4, "optimizer updates per step", at_least=1)
    max_staleness: int = setting(0, "weight versions that generation may be ahead; 0: synchronous")
    filter_groups: bool = setting(False, "replace groups whose accuracies are all equal")
    mask_overlong: bool = setting(False, "do not train on responses that reach the length limit, nor compare with them")
    min_accuracy: float = setting(0.0, "do not start RL below this accuracy after SFT: it would collapse", at_most=1)
    logprob_tolerance: float = setting(
        0.1, "warn if engine and trainer differ by more nats per token, averaged over a step"
    )
    loss: Loss = section(Loss)
    optim: Optim = section(Optim)


@dataclasses.dataclass
class Packing:
    """Sequences are packed into rows; `rows` x `length` tokens make one micro-batch."""

    rows: int = setting(
        8, "over the whole mesh; a multiple of mesh data x fsdp x expert; 0: one per device of these axes"
    )
    length: int = setting(0, "a multiple of mesh seq x tensor; 0: prompt + response budget (RL), max_length (SFT)")
    more_lengths: tuple = setting(
        (), "other row lengths; each mini-batch takes the one that wastes least (docs/scaling.md)"
    )


@dataclasses.dataclass
class Python:
    """The Python tool."""

    persistent: bool = setting(
        False, "keep variables across the calls of an episode, in one process; needs the embedded sandbox"
    )


@dataclasses.dataclass
class Agent:
    """Tools and episode budgets."""

    tools: tuple = setting(
        ("python",), '"python", "mcp:COMMAND" (a stdio MCP server) or "module:factory" (a function that makes a Tool)'
    )
    environment: str = setting(
        "", '"module:factory" of an Environment; empty: ToolEnvironment, from `tools` and grader'
    )
    call_seconds: float = setting(60.0, "per MCP tool call; for Python: sandbox.timeout")
    max_turns: int = setting(16, "assistant turns", at_least=1)
    max_prompt: int = setting(2560, "tool schemas included; longer prompts are dropped and counted", at_least=1)
    max_response: int = setting(20480, "everything after the prompt, tool tokens included", at_least=1)
    max_tool_tokens: int = setting(2048, "per tool output; longer ones lose their middle, with a mark", at_least=1)
    seconds: float = setting(1800.0, "per episode; what was sampled by then is graded", above=0)
    python: Python = section(Python)
    harness: Harness = section(Harness)
    max_errors: float = setting(
        0.5, "end the run if exceptions of tools, grader or environment end more than this share of episodes", at_most=1
    )


@dataclasses.dataclass
class Reward:
    """Grading and shaping."""

    grader: str = setting("", '"module:function" (task, text) -> Score; empty: by problem kind (rewards/graders.py)')
    turn_bonus: str = setting("off", choices=("off", "paper", "reference"))
    overlong_buffer: int = setting(4096, "0: off")
    overlong_factor: float = setting(1.0)
    count_tool_tokens: bool = setting(True, "in the length that the overlong penalty uses")


@dataclasses.dataclass
class Sandbox:
    """Where Python code runs."""

    urls: tuple = setting((), "SandboxFusion servers; empty: the embedded sandbox", resumable=True)
    timeout: float = setting(30.0, above=0)
    memory_mb: int = setting(2048, at_least=1)
    max_active: int = setting(0, "concurrent runs per process; 0: 2 x cores (embedded), 128 (servers)", resumable=True)
    unsafe_no_isolation: bool = setting(False, "run code although this machine offers no isolation")


@dataclasses.dataclass
class Rollout:
    """Generation."""

    engine: str = setting("local", choices=("local", "sglang"))
    temperature: float = setting(1.0)
    top_p: float = setting(1.0, above=0, at_most=1)
    top_k: int = setting(0, "0: off")
    slots: int = setting(64, "local: sequences in the KV cache", at_least=1)
    decode_chunk: int = setting(16, "local: tokens decoded per dispatch", at_least=1)
    weights: str = setting(
        "same",
        "local; int8: 8-bit weights, which sample from another policy (docs/scaling.md); merged: with LoRA, a copy of "
        "the weights with the adapters added",
        choices=("same", "int8", "merged"),
    )
    concurrency: int = setting(
        0, "concurrent episodes per process; 0: `slots` (local), 256 per server (sglang)", resumable=True
    )
    servers: tuple = setting((), "sglang: base URLs, divided over the processes", resumable=True)
    launch_servers: int = setting(
        0, "sglang: number of servers that each process starts and stops itself", resumable=True
    )
    weights_dir: str = setting(
        "", "sglang: a directory that all servers can read; empty: <run_dir>/weights", path=True, resumable=True
    )
    refit: str = setting(
        "auto", "sglang: how weights travel", choices=("auto", "files", "tensors", "distributed"), resumable=True
    )
    keep_cache: bool = setting(False, "sglang: updates keep the cache of running episodes, computed by older weights")
    deadline: float = setting(600.0, "sglang: per request", above=0, resumable=True)
    startup_seconds: float = setting(
        30.0, "sglang: how long to wait at start while no server answers", above=0, resumable=True
    )
    api_key_env: str = setting("", "sglang: environment variable with the servers' API key", resumable=True)
    server_kind: str = setting(
        "sglang", "launch_servers: which server (third_party/)", choices=("sglang", "sglang_jax"), resumable=True
    )
    server_tensor: int = setting(
        1, "launch_servers: devices per server, on machines with accelerators", at_least=1, resumable=True
    )
    server_memory: float = setting(
        0.85, "launch_servers: share of the device memory per server", above=0, at_most=1, resumable=True
    )
    server_first_device: int = setting(
        0, "launch_servers: GPU index of the first server; the others follow", at_least=0, resumable=True
    )


@dataclasses.dataclass
class Eval:
    """Held-out accuracy."""

    every: int = setting(0, "RL steps; 0: only before and after RL")
    samples: int = setting(1, "trajectories per problem", at_least=1)
    temperature: float = setting(1.0)
    top_p: float = setting(1.0, above=0, at_most=1)


@dataclasses.dataclass
class Checkpoint:
    """Which checkpoints are kept, and where."""

    every: int = setting(30, "steps", at_least=1)
    keep: int = setting(3, "newest checkpoints", at_least=1)
    keep_best: bool = setting(False, "also keep the checkpoint with the best held-out accuracy")
    copy_to: str = setting(
        "",
        "gs://, s3:// or a folder: checkpoints and export are copied there, and a new machine resumes from it",
        path=True,
    )


@dataclasses.dataclass
class Mesh:
    """Devices per axis; -1 takes all remaining devices."""

    data: int = setting(1, "replicas of the parameters; the batch is split over them", at_least=-1)
    fsdp: int = setting(-1, "shards of the parameters; the batch is split over them too", at_least=-1)
    seq: int = setting(1, "shards of each row and of the vocabulary (context parallelism)", at_least=-1)
    tensor: int = setting(1, "shards of heads, hidden units and vocabulary", at_least=-1)
    expert: int = setting(1, "shards of the experts of a mixture; the batch is split over them too", at_least=-1)


@dataclasses.dataclass
class Telemetry:
    """In addition to metrics.jsonl and trajectories.jsonl, which are always written."""

    tensorboard: bool = setting(False)
    wandb_project: str = setting("", "empty: off")


@dataclasses.dataclass
class Config:
    """One experiment."""

    name: str = setting("run")
    run_dir: str = setting("", "empty: runs/<name>", path=True, resumable=True)
    seed: int = setting(0)
    behaviour: str = setting(
        "robust",
        "reference: compute what the published code computes, with its faults",
        choices=("robust", "reference"),
    )
    model: Model = section(Model)
    data: Data = section(Data)
    sft: SFT = section(SFT)
    rl: RL = section(RL)
    packing: Packing = section(Packing, resumable=True)
    agent: Agent = section(Agent)
    reward: Reward = section(Reward)
    sandbox: Sandbox = section(Sandbox)
    rollout: Rollout = section(Rollout)
    eval: Eval = section(Eval)
    checkpoint: Checkpoint = section(Checkpoint, resumable=True)
    mesh: Mesh = section(Mesh, resumable=True)
    telemetry: Telemetry = section(Telemetry, resumable=True)

    @property
    def directory(self) -> str:
        """The run directory."""
        return self.run_dir or f"runs/{self.name}"


def row_config(config: Config, source: Source) -> Config:
    """The config that plays the problems of one row of `data.sources`."""
    row = copy.deepcopy(config)
    row.data.sources = ()
    agent = row.agent
    if source.environment or source.harness.command or source.harness.function:
        agent.environment, agent.harness = source.environment, copy.deepcopy(source.harness)
    if tuple(source.tools) != ("run",):
        agent.tools = source.tools
    row.reward.grader = source.grader or row.reward.grader
    for name in ("max_turns", "max_response", "seconds"):
        setattr(agent, name, getattr(source, name) or getattr(agent, name))
    row.reward.overlong_buffer = min(row.reward.overlong_buffer, agent.max_response)
    return row


def validate(config: Config) -> list[str]:
    """All faults of a config, one line each with field and cure; empty if there is none."""
    faults = [fault(name, getattr(part, field.name), field) for name, part, field in settings(config)]
    if not all(isinstance(source, Source) for source in config.data.sources):
        faults.append("data.sources holds something other than Source(path=...); give a tuple of them")
    if any(faults):
        return [text for text in faults if text]
    found = list(broken_rules(config))
    if not found:
        for i, source in enumerate(config.data.sources):
            row = row_config(config, source)
            row.data.train = source.path
            found += [f"data.sources[{i}]: {text}" for text in broken_rules(row)]
    return found
