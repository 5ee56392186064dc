"""What a run says while it trains: a bar on terminals, and a line for what is logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback

from modeling_hope.conversion.progress import bars_shown


class Console(ProgressCallback):
    """Transformers' bar, on terminals alone, with lines above it that name what matters in a log."""

    def __init__(self, say: Callable[[str], None]):
        super().__init__()
        self.say = say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=not bars_shown())
        self.current_step = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and (line := describe(logs or {})):
            with tqdm.external_write_mode():
                self.say(f"step {state.global_step:>6,}  {line}")


def describe(logs: Mapping[str, Any]) -> str:
    """The losses or perplexities of a log in a line, with the means of the memory's figures; empty for other logs."""
    if "loss" in logs:
        speed = f"  {logs['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in logs else ""
        return f"loss {logs['loss']:.4f}  learning rate {logs['learning_rate']:.2e}{speed}"
    if "eval_perplexity" not in logs:
        return ""
    parts = [f"perplexity {logs['eval_perplexity']:.2f}"]
    if "eval_perplexity_learning" in logs:
        parts.append(f"learning {logs['eval_perplexity_learning']:.2f}")
    for kind in ("rate", "decay", "change"):
        if values := [value for name, value in logs.items() if name.startswith(f"memory/{kind}_")]:
            parts.append(f"{kind} {sum(values) / len(values):.4f}")
    if updates := [value for name, value in logs.items() if name.startswith("levels/updates_")]:
        parts.append(f"updates {', '.join(map(str, updates))}")
    return "  ".join(parts)
