"""
hope train: train a model from scratch, or go on with a checkpoint, by a recipe.

A recipe is a YAML file, or the name of one that comes with the package; every flag below is a field of it and takes its
place. The whole of it is printed, and saved with the run.

    hope train smoke --out run
    hope train ladder-2m --train corpus/train --validation corpus/validation --out run
    hope train --continue converted --train corpus/train --validation corpus/validation --out run
    hope train --out run --resume
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from modeling_hope.training.recipe import SAVED, TrainingRecipe, read_recipe


CONTINUE = "continue"  # the recipe of `--continue`
# Of these a recipe sets one: a flag takes the place of either.
EITHER = (("steps", "epochs"), ("tokenizer", "train_tokenizer"), ("validation", "validation_fraction"))
MOST_CHOICES = 7  # that stand in a flag's own line of the help


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        usage="hope train [RECIPE] [--FIELD VALUE]... [--continue CHECKPOINT] [--resume] [--dry-run]",
        help="train or fine-tune a model by a recipe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", default=None, help="YAML file, or the name of a recipe that is packaged"
    )
    parser.add_argument(
        "--continue", dest="continued", metavar="CHECKPOINT", default=None,
        help="train on with learning on, from this checkpoint: the recipe `continue`, unless another is named",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", default=False, help="go on with the run in --out, from its last checkpoint"
    )
    parser.add_argument("--dry-run", action="store_true", default=False, help="check the recipe, print it, and stop")
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(TrainingRecipe)
    for field in dataclasses.fields(TrainingRecipe):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        add_field(groups[name], field, hints[field.name])
    parser.set_defaults(run=run, extra="train")


def add_field(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    """A flag for a field of the recipe."""
    flag, says = f"--{field.name.replace('_', '-')}", field.metadata["help"].replace("%", "%%")
    default = field.default if field.default is not dataclasses.MISSING else None
    if default not in (None, ""):
        says += f" (default: {default})"
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    several = any(typing.get_origin(kind) is list for kind in kinds)
    if bool in kinds:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=says)
    elif any(typing.get_origin(kind) is dict for kind in kinds):
        group.add_argument(flag, nargs="+", type=setting, metavar="KEY=VALUE", action=Settings, help=says)
    else:
        choices = field.metadata["choices"]
        numeric = bool({int, float} & {*kinds, *(part for kind in kinds for part in typing.get_args(kind))})
        options: dict[str, Any] = {"metavar": "N" if numeric else field.name.upper()}
        if 0 < len(choices) <= MOST_CHOICES:
            options = {"choices": choices}
        elif choices:
            says += f"; one of {', '.join(choices)}"
        kind = scalar if numeric else word if type(None) in kinds else str
        group.add_argument(flag, nargs="+" if several else None, type=kind, help=says, **options)


def scalar(text: str) -> Any:
    """A number, `none`, or a word, as YAML has them."""
    try:
        return None if text == "none" else yaml.safe_load(text)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def word(text: str) -> str | None:
    return None if text == "none" else text


def setting(text: str) -> tuple[str, Any]:
    """`"hidden_size=64"` to `("hidden_size", 64)`; the value is YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r}: give KEY=VALUE, e.g. hidden_size=64")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"{text!r}: the value is no YAML") from None


class Settings(argparse.Action):
    """Gathers KEY=VALUE pairs, of every time that the flag is given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), **dict(values)})


def run(arguments: argparse.Namespace) -> None:
    from transformers.utils import logging

    from modeling_hope.conversion.progress import bars_shown
    from modeling_hope.training.train import train

    recipe = recipe_of(arguments)
    if arguments.dry_run:
        print(recipe.as_yaml().rstrip())
        return
    if not bars_shown():
        logging.disable_progress_bar()
    train(recipe, resume=arguments.resume)


def recipe_of(arguments: argparse.Namespace) -> TrainingRecipe:
    """The recipe that is named, with the flags that are given in the place of its fields; mappings are joined."""
    hints = typing.get_type_hints(TrainingRecipe)
    flags = {name: sole(getattr(arguments, name), hint) for name, hint in hints.items() if name in arguments}
    fields: dict[str, Any] = {}
    if arguments.resume and arguments.recipe is None and arguments.continued is None:
        saved = Path(flags.get("out", "")) / SAVED
        if "out" not in flags or not saved.is_file():
            raise ValueError("`--resume` needs `--out DIR`, of a run that was begun.")
        fields = read_recipe(saved)
    elif arguments.recipe or arguments.continued:
        fields = read_recipe(arguments.recipe or CONTINUE)
    if arguments.continued:
        if "model" in flags:
            raise ValueError("`--continue` and `--model` both name a checkpoint: leave one out.")
        fields["model"] = arguments.continued
    for pair in EITHER:
        if given := [name for name in pair if name in flags]:
            fields = {name: value for name, value in fields.items() if name not in pair or name in given}
    for name, value in flags.items():
        known = fields.get(name)
        fields[name] = {**known, **value} if isinstance(value, dict) and isinstance(known, dict) else value
    return TrainingRecipe.from_fields(fields)


def sole(value: Any, hint: Any) -> Any:
    """What a flag of several words was given, or the word itself where it is one that stands for all."""
    if isinstance(value, list) and len(value) == 1 and isinstance(hint, types.UnionType):
        return value[0] if type(value[0]) in typing.get_args(hint) else value
    return value
