"""
hope eval: lm-eval's own command line, with the model type `hope` and the tasks of this package.

All of lm-eval's subcommands and flags are there, and --model is hope unless it is given. Besides what the type hf takes,
--model_args takes

    memory=reset|stream     each document alone (as hf), or a task's documents one after the other with one memory
    read=question|question_and_answer|question_and_prediction|nothing
                            with memory=stream: what of a document is read into the memory, after it was scored; tasks that
                            ask questions need it, unless their documents say it (class_incremental and ctnl do)
    separator="'\\n\\n'"      with memory=stream: text that is read between two documents
    learn=prompt|all|off    what is learned from (all: what the model says itself, too); unset, the model decides
    levels=0+1              the levels that may learn

    hope eval --model_args pretrained=DIR --tasks hope_niah_number --batch_size 8
    hope eval --model_args pretrained=DIR,memory=stream,read=question_and_answer --tasks arc_easy
    hope eval ls tasks
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import modeling_hope.eval


TASKS = Path(next(iter(modeling_hope.eval.__path__))) / "tasks"
# Groups of lm-eval's built-in tasks, whose data are on the hub.
ON_THE_HUB = ("hope_table1", "hope_table2", "hope_table3")
SECONDS_TO_REACH_THE_HUB = 10
NO_HUB = (
    "the data of {tasks} are on the Hugging Face hub, which cannot be reached{why}. Run this where there is a network; "
    "the other tasks of this package (hope eval ls tasks) need none."
)


def add_to(commands: Any) -> None:
    # No flag is its own: with this prefix none is taken for one, not even --help.
    parser = commands.add_parser(
        "eval",
        usage="hope eval [run|ls|validate] [--FLAG VALUE]...",
        help="evaluate a model with lm-eval",
        prefix_chars="\0",
        add_help=False,
    )
    parser.add_argument("words", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run, extra="eval")


def run(arguments: argparse.Namespace) -> None:
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.api.registry import model_registry
    from lm_eval.utils import setup_logging

    if "hope" not in model_registry:
        model_registry.register("hope", target="modeling_hope.eval.lm:HopeLM")
    if arguments.words[:1] in ([], ["-h"], ["--help"]):
        print(__doc__)
    setup_logging()
    harness = HarnessCLI()
    with command_line(["hope eval", *(arguments.words or ["--help"])]):
        parsed = harness.parse_args()
    if hasattr(parsed, "include_path"):
        settings = settle(parsed)
        if parsed.command == "run":
            check(settings)
    try:
        harness.execute(parsed)
    except Exception as error:
        if (reason := no_network(error)) is None:
            raise
        names = ", ".join(as_names(getattr(parsed, "tasks", None))) or "these tasks"
        raise ValueError(NO_HUB.format(tasks=names, why=f" ({reason})")) from error


@contextmanager
def command_line(words: list[str]) -> Iterator[None]:
    """lm-eval's parser reads the process's own."""
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


def settle(parsed: argparse.Namespace) -> dict[str, Any]:
    """
    Give lm-eval's arguments our tasks and our model type, where no other is named.

    Returns:
        The settings of the run: those of a YAML file (`--config`), with the flags in their place.
    """
    from lm_eval.config.evaluate_config import EvaluatorConfig

    settings: dict[str, Any] = {}
    if config := getattr(parsed, "config", None):
        settings = EvaluatorConfig.load_yaml_config(config)
    settings |= {name: value for name, value in vars(parsed).items() if value is not None}
    if parsed.command == "run" and settings.get("model") is None:
        settings["model"] = parsed.model = "hope"
    theirs = settings.get("include_path") or []
    # Those that come later take the place of others of the same name.
    parsed.include_path = [str(TASKS), *([theirs] if isinstance(theirs, str) else theirs)]
    return settings


def check(settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` for what cannot be, before tasks are looked for and a model is loaded."""
    from lm_eval.utils import simple_parse_args_string

    model_args = settings.get("model_args") or {}
    if isinstance(model_args, str):
        model_args = simple_parse_args_string(model_args)
    if settings["model"] == "hope":
        from modeling_hope.eval.lm_settings import MemorySettings

        if not model_args.get("pretrained"):
            raise ValueError(
                "`pretrained` is missing: give --model_args pretrained=DIR, a Hope model or its name on the hub."
            )
        run = {name: settings.get(name) for name in ("use_cache", "cache_requests", "batch_size")}
        MemorySettings.of_command(model_args, {name: value for name, value in run.items() if value is not None})
    asked = as_names(settings.get("tasks"))
    groups = [group for group in ON_THE_HUB if any(fnmatch(group, name) for name in asked)]
    if groups and not downloaded(groups) and (reason := hub_unreachable()):
        raise ValueError(NO_HUB.format(tasks=", ".join(groups), why=f" ({reason})"))


def as_names(tasks: Any) -> list[str]:
    return [name for part in ([tasks] if isinstance(tasks, str) else tasks or []) for name in part.split(",")]


def hub_unreachable() -> str | None:
    """Why the hub cannot be reached; `None` where it can."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_REACH_THE_HUB)
    except Exception as error:  # of whichever HTTP library it is
        return type(error).__name__
    return None


def downloaded(groups: Sequence[str]) -> bool:
    """Whether all data of the groups lie in the cache of `datasets`, which then needs no network."""
    import yaml
    from datasets import config

    named = [yaml.safe_load((TASKS / "paper" / f"{group}.yaml").read_text()) for group in groups]
    data = {path for each in named for path in each["metadata"]["datasets"]}
    place = Path(config.HF_DATASETS_CACHE)
    held = {plain(directory.name) for directory in place.iterdir()} if place.is_dir() else set()
    return {plain(path) for path in data} <= held


def plain(name: str) -> str:
    """Of a data set, whether the name of its repository or of its directory in the cache."""
    return name.replace("/", "").replace("_", "").lower()


def no_network(error: BaseException | None) -> str | None:
    """What in a chain of exceptions says that the hub was not reached; `None` where nothing does."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        # Subclasses of ConnectionError are of pipes and sockets too; `datasets` raises it as it is.
        if type(error) is ConnectionError or isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return type(error).__name__
        error = error.__cause__ or error.__context__
    return None
