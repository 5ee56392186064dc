"""A recipe: all that a training run is made of, as typed fields, read from YAML or from flags and checked at once."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import strict
from transformers import SchedulerType, TrainingArguments

from modeling_hope.optimizers.by_name import OPTIMIZERS

from .options import as_declared, check_options, option
from .yaml_numbers import Dumper, Loader


LAYOUTS = ("packed", "concatenated", "documents")
DTYPES = ("float32", "bfloat16")
LEARNING = ("off", "on")
RECIPES = Path(__file__).parent / "recipes"
SAVED = "recipe.yaml"  # beside the run's checkpoints


@strict
@dataclasses.dataclass
class TrainingRecipe:
    """
    What a run is made of. Every field is a key of a recipe file and a flag of `hope train`; what it means is in its
    `help`, which `hope train --help` prints.

    Raises:
        ValueError, StrictDataclassError: a field has an impossible type or value; it is named, with the fix.
    """

    out: str = option("", "run", "directory for checkpoints, logs, plots and the trained model")
    model: str | None = option(None, "model", "checkpoint to go on from, a directory or a hub name; none: a new model")
    config: dict[str, Any] = option(
        dict, "model", "fields of a new model's config (`model_type`, hope unless set), or to change of `model`'s"
    )
    config_from: str | None = option(None, "model", "directory or hub name whose config a new model has")
    tokenizer: str | None = option(None, "model", "directory or hub name of a tokenizer; none: that of `model`")
    train_tokenizer: int | None = option(
        None, "model", "train a byte-level BPE tokenizer of so many tokens on the text to train on", least=258
    )

    train: list[str] = option(
        list,
        "data",
        "text to train on: files, directories and patterns, of .txt, .md and .jsonl, or datasets:NAME[:CONFIG[:SPLIT]]",
    )
    validation: list[str] = option(list, "data", "text to evaluate on, as `train`")
    validation_fraction: float = option(0.0, "data", "part of the documents of `train` to evaluate on instead")
    text_field: str = option("text", "data", "of a record: its text")
    source_field: str = option("source", "data", "of a record: where it is from; perplexities are by source")
    separator: str | None = option(None, "data", "what stands between documents in a .txt file; none: a file is one")
    layout: str = option(
        "packed",
        "data",
        "packed: several documents in a row, each read with a memory of its own; concatenated: read as one text; "
        "documents: one a row, longer ones in several rows, shorter ones padded",
        LAYOUTS,
    )
    sequence_length: int = option(512, "data", "tokens of a row, at most", least=2)
    min_document_tokens: int = option(2, "data", "leave shorter documents out", least=2)
    token_cache: str | None = option(None, "data", "directory for tokenized text, which other runs then need not make")

    steps: int | None = option(None, "training", "steps of the optimizer; none: as many as `epochs` take", least=1)
    epochs: float | None = option(None, "training", "passes over the text", above=0)
    batch_size: int = option(8, "training", "rows of a process at a time", least=1)
    accumulate: int = option(1, "training", "batches to a step", least=1)
    optimizer: str = option("adamw", "training", "by its name", tuple(OPTIMIZERS))
    learning_rate: float = option(1e-3, "training", "of the optimizer, at its largest", above=0)
    rates_learning_rate: float | None = option(
        None,
        "training",
        "the same for the levels' own rates, which second_order can learn (`cms_learn_rates`); none: `learning_rate`",
        above=0,
    )
    weight_decay: float = option(0.1, "training", "decoupled, of matrices", least=0)
    optimizer_options: dict[str, Any] = option(dict, "training", "further ones, by name")
    level_periods: str | list[int] | None = option(
        None, "training", "steps from one update of a level to the next, of each level; config: as `cms_periods`"
    )
    schedule: str = option(
        "cosine", "training", "of the learning rate", tuple(str(kind.value) for kind in SchedulerType)
    )
    warmup: float = option(0.05, "training", "part of the steps in which the learning rate rises")
    max_grad_norm: float = option(1.0, "training", "largest norm of a step's gradient; 0 for no bound", least=0)
    label_smoothing: float = option(0.0, "training", "part of the targets that is spread over the vocabulary")
    dtype: str = option(
        "float32", "training", "of activations: bfloat16 runs in autocast, weights stay float32", DTYPES
    )
    gradient_checkpointing: bool = option(False, "training", "take less memory and more time")
    seed: int = option(0, "training", "of weights, of the order of rows, of dropout", least=0)
    arguments: dict[str, Any] = option(dict, "training", "further fields of Transformers' TrainingArguments")

    evaluate_every: int | None = option(
        None, "evaluation", "steps between evaluations, the first before any step; none: one at the end", least=1
    )
    evaluation_length: int | None = option(
        None, "evaluation", "tokens of a row there; none: `sequence_length`", least=2
    )
    evaluation_rows: int | None = option(None, "evaluation", "rows of a source, at most; none: all", least=1)
    evaluate_learning: list[str] | None = option(
        None, "evaluation", "off, on or both: whether levels learn while they are evaluated; none: off where "
        "cms_training is static, else both",
        LEARNING,
    )  # fmt: skip
    memory_tokens: int = option(
        2048,
        "evaluation",
        "of text that is read with learning on at every evaluation, for figures of the memory; 0 for none",
        least=0,
    )

    log_every: int = option(10, "log", "steps between logged losses", least=1)
    save_every: int | None = option(
        None, "log", "steps between checkpoints, from which a killed run can go on; none: no checkpoints", least=1
    )
    keep_checkpoints: int = option(2, "log", "older ones are deleted", least=1)
    plots: bool = option(True, "log", "draw losses.png and memory.png, where matplotlib is installed")
    report_to: list[str] = option(list, "log", "tensorboard, trackio or others that Transformers knows")

    def validate_run(self) -> None:
        """Part of the strict validation: what can be known of the fields alone."""
        if not self.out:
            raise ValueError("`out` is not set: give a directory for the run, `--out DIR`.")
        if not self.train:
            raise ValueError("`train` is empty: give text to train on, `--train FILE...`.")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("Set one of `steps` and `epochs`.")
        if self.model and self.config_from:
            raise ValueError("`model` has a config: leave out `config_from`.")
        if self.tokenizer and self.train_tokenizer:
            raise ValueError("`tokenizer` and `train_tokenizer` are both set: leave one out.")
        if self.model and self.train_tokenizer:
            raise ValueError(
                "`train_tokenizer`: a `model` that is trained already needs the tokenizer it was trained with."
            )
        if not (self.model or self.tokenizer or self.train_tokenizer):
            raise ValueError("A new model needs a tokenizer: set `tokenizer` or `train_tokenizer`.")
        if self.validation and self.validation_fraction:
            raise ValueError("`validation` and `validation_fraction` are both set: leave one out.")
        if self.evaluate_every and not (self.validation or self.validation_fraction):
            raise ValueError("`evaluate_every` needs text: set `validation` or `validation_fraction`.")

    def validate_choices(self) -> None:
        """Part of the strict validation."""
        check_options(self)
        if isinstance(self.level_periods, str) and self.level_periods != "config":
            raise ValueError(f"`level_periods` must be config, or a number for each level, got {self.level_periods!r}.")
        decided = sorted(set(self.arguments) & DECIDED)
        if decided:
            raise ValueError(f"`arguments` has `{decided[0]}`, which other fields of the recipe decide: leave it out.")
        for name, why in REFUSED.items():
            if self.arguments.get(name):
                raise ValueError(f"`arguments` has `{name}`, with which {why}: leave it out.")
        known = {field.name for field in dataclasses.fields(TrainingArguments)}
        if unknown := sorted(set(self.arguments) - known):
            raise ValueError(f"`arguments` has `{unknown[0]}`: TrainingArguments has no such field.")

    def validate_numbers(self) -> None:
        """Part of the strict validation."""
        if not self.seed < 2**32:
            raise ValueError(f"`seed` must be below 2**32, got {self.seed}.")
        for name in ("validation_fraction", "warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 0 and below 1, got {getattr(self, name)}.")

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "TrainingRecipe":
        """
        Of the keys of a YAML file, or of flags.

        Raises:
            ValueError: a key is none of a recipe's.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [str(name) for name in fields if name not in names]
        if unknown:
            raise ValueError(f"A recipe has no field `{unknown[0]}`. It has {', '.join(names)}.")
        return cls(**as_declared(cls, fields))

    def as_yaml(self) -> str:
        """Every field, in their order; `from_fields` of it is this recipe."""
        fields = dataclasses.asdict(self)
        return yaml.dump(fields, Dumper=_Brief, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


# Fields of TrainingArguments that a recipe sets by another name.
DECIDED = {
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps",
    "max_grad_norm", "label_smoothing_factor", "bf16", "gradient_checkpointing", "seed", "data_seed", "eval_strategy",
    "eval_steps", "logging_steps", "logging_nan_inf_filter", "save_strategy", "save_steps", "save_total_limit",
    "report_to", "remove_unused_columns", "optim", "include_num_input_tokens_seen", "push_to_hub",
    "resume_from_checkpoint", "eval_on_start", "activation_checkpointing", "logging_first_step",
}  # fmt: skip
# Further ones, and what would not hold with them.
REFUSED = {
    "save_only_model": "a killed run could not go on",
    "ignore_data_skip": "a run that goes on would read other rows",
    "load_best_model_at_end": "the figures would be of another model than the one that is saved",
}


def read_recipe(name: str | Path) -> dict[str, Any]:
    """
    The fields that a recipe file sets.

    Args:
        name: of a YAML file, or of one of the recipes that come with the package, without `.yaml`.

    Raises:
        ValueError: there is none, or it holds no fields, or one of them twice.
    """
    known = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    path = known.get(str(name), Path(name))
    if not path.is_file():
        raise ValueError(f"There is no recipe {str(name)!r}: give a YAML file, or one of {', '.join(known)}.")
    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), _EachOnce)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}): convert it.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no recipe: {' '.join(str(error).split())}.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no fields of a recipe: write `field: value` lines.")
    return fields


class _Brief(Dumper):
    """Line breaks as recipe files write them, `"\\n"`."""


_Brief.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None),
)


class _EachOnce(Loader):
    """YAML's own loader keeps the last of two fields of one name, and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"`{name}` stands there twice", problem_mark=key.start_mark)
            seen.append(name)
        return super().construct_mapping(node, deep)


__all__ = ["TrainingRecipe", "read_recipe"]
