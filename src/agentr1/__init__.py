"""agentr1: reinforcement learning for tool-using language-model agents, on Hugging Face TRL.

What a tool or environment author needs, and nothing that imports torch, transformers or TRL: their
tests run in milliseconds. The trainer is `from agentr1.trainer import AgentTrainer`.
"""

from agentr1.envs.base import Env
from agentr1.envs.check import check_env
from agentr1.envs.tool_env import ToolEnv
from agentr1.tools.base import Tool, ToolError, tool
from agentr1.tools.policy import ToolPolicy
from agentr1.types import (
    Message,
    Segment,
    StepResult,
    StopReason,
    ToolCall,
    ToolResult,
    Trajectory,
    Turn,
)

__version__ = "0.1.0"

__all__ = [
    "Env",
    "Message",
    "Segment",
    "StepResult",
    "StopReason",
    "Tool",
    "ToolCall",
    "ToolEnv",
    "ToolError",
    "ToolPolicy",
    "ToolResult",
    "Trajectory",
    "Turn",
    "__version__",
    "check_env",
    "tool",
]
