"""Flags made of the fields of a dataclass that `option` declared: a recipe's, a study's."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from typing import Any

import yaml

from modeling_hope.training.yaml_numbers import load


MOST_CHOICES = 7  # that stand in a flag's own line of the help


def add_fields(parser: argparse.ArgumentParser, settings: type[Any]) -> None:
    """A flag for every field, in their groups."""
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        add_field(groups[name], field, hints[field.name])


def given_fields(arguments: argparse.Namespace, settings: type[Any]) -> dict[str, Any]:
    """The fields that flags were given for."""
    hints = typing.get_type_hints(settings)
    return {name: sole(getattr(arguments, name), hint) for name, hint in hints.items() if name in arguments}


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
        return None if text == "none" else load(text)
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
        return key, load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"{text!r}: the value is no YAML") from None


class Settings(argparse.Action):
    """Gathers KEY=VALUE pairs, of every time that the flag is given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), **dict(values)})


def sole(value: Any, hint: Any) -> Any:
    """What a flag of several words was given, or the word itself where it is one that stands for all."""
    if isinstance(value, list) and len(value) == 1 and isinstance(hint, types.UnionType):
        return value[0] if type(value[0]) in typing.get_args(hint) else value
    return value
