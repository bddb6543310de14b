"""What a recipe names: data, environment, tools, rewards.

Layer 5, the half of a recipe that `config.AgentConfig` is not. Names stay names here; `task.py`
turns them into objects. Nothing in this module opens a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TAPE_WAYS = ("record", "replay")
"""What `--tools WAY:FILE` does with the recipe's tools."""


@dataclass
class RecipeArguments:
    """What a recipe names: data, environment, tools, rewards."""

    dataset: str = field(
        default="data/quickstart",
        metadata={"help": "Folder with train, dev and test rows (.jsonl or .jsonl.gz)."},
    )
    corpus: str | None = field(
        default=None,
        metadata={
            "help": "Passages (.jsonl or .jsonl.gz), an index folder or a retriever's address "
            "(http://host:8000); default: corpus.* in the dataset."
        },
    )
    demonstrations: str | None = field(
        default=None, metadata={"help": "Conversations for `agentr1 sft` (.jsonl)."}
    )
    train_limit: int | None = field(default=None, metadata={"help": "Use so many train rows."})
    dev_limit: int | None = field(default=None, metadata={"help": "Use so many dev rows."})
    test_limit: int | None = field(default=None, metadata={"help": "Use so many test rows."})
    base_model: str | None = field(
        default=None,
        metadata={
            "help": "Untrained model of the baselines, where `model_name_or_path` is a cold start."
        },
    )
    environment: str = field(
        default="agentr1.envs.tool_env.ToolEnv",
        metadata={"help": "Dotted path of the environment."},
    )
    tools: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Dotted paths of tools; a path to a function or class that is no tool itself "
            "is called with the corpus and `search_top_k` to make one."
        },
    )
    search_top_k: int = field(default=3, metadata={"help": "Passages one search returns."})
    search_passage_chars: int | None = field(
        default=None, metadata={"help": "Cut each passage there, at the end of a word."}
    )
    tool_timeout: float = field(
        default=30.0, metadata={"help": "Seconds one attempt of a call may take."}
    )
    tool_retries: int = field(
        default=0,
        metadata={"help": "Further attempts after a fault, for tools that may be called twice."},
    )
    tool_backoff: float = field(
        default=0.5, metadata={"help": "Seconds before the first retry; doubled for each further."}
    )
    tool_deadline: float | None = field(
        default=None, metadata={"help": "Seconds for all attempts of a call, pauses included."}
    )
    tool_concurrency: int = field(default=32, metadata={"help": "Calls of one tool at once."})
    tool_cache: bool = field(
        default=False, metadata={"help": "Answer equal calls by one result, over the whole run."}
    )
    tool_max_calls: int | None = field(
        default=None, metadata={"help": "Calls of each tool in one episode."}
    )
    max_calls: int | None = field(
        default=None,
        metadata={"help": "Calls of all tools together in one episode; `finish_tool` is free."},
    )
    tool_max_chars: int = field(
        default=4000, metadata={"help": "Longer tool results are truncated, and say so."}
    )
    tool_tape: str | None = field(
        default=None,
        metadata={
            "help": "`record:FILE` keeps every result of the tools, `replay:FILE` answers from "
            "the file and runs none; on the command line: `--tools record:FILE`."
        },
    )
    tool_replay_latency: float = field(
        default=0.0,
        metadata={"help": "A replay waits so many times the seconds a call took."},
    )
    system_prompt: str | None = field(default=None, metadata={"help": "Opens every conversation."})
    finish_tool: str | None = field(
        default=None, metadata={"help": "Name of the tool whose call ends the episode."}
    )
    keep_last_observations: int | None = field(
        default=None,
        metadata={"help": "Show so many of the latest observations; a notice replaces the others."},
    )
    context_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens the policy is shown before a turn at most, prompt and tools included; "
            "the oldest observations are dropped until they fit."
        },
    )
    tell_budget: bool = field(
        default=False, metadata={"help": "End each observation with the turns and tokens left."}
    )
    rewards: list[str] = field(
        default_factory=lambda: ["agentr1.rewards.exact_match_reward"],
        metadata={"help": "Dotted paths of outcome rewards; weights: `reward_weights`."},
    )
    process_rewards: list[str] = field(
        default_factory=list, metadata={"help": "Dotted paths of process rewards."}
    )
    process_reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per process reward; default all 1."}
    )
    metrics: list[str] = field(
        default_factory=lambda: ["agentr1.rewards.exact_match_reward"],
        metadata={"help": "Dotted paths of the metrics of evaluation; same shape as rewards."},
    )

    def __post_init__(self) -> None:
        for name in ("tools", "rewards", "process_rewards", "metrics"):
            if not isinstance(getattr(self, name), list):
                raise ValueError(
                    f"{name} must be a list of dotted paths, got {getattr(self, name)!r}; write "
                    f"{name}: [{getattr(self, name)}]"
                )
        for name in ("rewards", "metrics"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one function, got none")
        if taped := [path for path in self.tools if path.partition(":")[0] in TAPE_WAYS]:
            raise ValueError(
                f"tools must name tools, got {taped}; write tool_tape: {taped[0]} beside them, or "
                f"--tools {taped[0]} alone on the command line"
            )
        way, _, file = (self.tool_tape or "record:FILE").partition(":")
        if way not in TAPE_WAYS or not file:
            raise ValueError(
                f"tool_tape must be record:FILE or replay:FILE, got {self.tool_tape!r}"
            )
        if self.tool_replay_latency < 0:
            raise ValueError(
                f"tool_replay_latency must be 0 or more, got {self.tool_replay_latency!r}"
            )
        weights = self.process_reward_weights
        if weights is not None and len(weights) != len(self.process_rewards):
            raise ValueError(
                f"process_reward_weights needs one weight per process reward, got {weights} for "
                f"{self.process_rewards}"
            )
