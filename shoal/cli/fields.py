"""Turns fields of dataclasses into options of a command, so that each option is defined in one place.

A parameter of a command whose type is a dataclass stands for one option for each field. The field defines the option's
name, type and default, and the string below the field is its help. `metadata={"cli": ...}` changes this: a string such
as ``"--gate"`` is the option's spelling, a tuple has several spellings, ``"argument"`` makes it a positional argument,
and None leaves the field out. With `metadata={"values": ...}` the help ends with a list of these values; for a mapping
to strings, with each value and its meaning.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.errors import ShoalError


@dataclass(frozen=True)
class Form:
    """How a type is typed on the command line.

    `typed` is the type that typer parses, `convert` makes the value from it, and `written` turns a default into it.
    """

    typed: Any
    convert: Callable[[Any, str], Any] = lambda value, option: value
    written: Callable[[Any], Any] = lambda value: value


def numbers(text: str | None, option: str) -> tuple[float, ...]:
    """Numbers separated by commas; empty for None. Raises ShoalError for other text."""
    try:
        return tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError as error:
        raise ShoalError(f"found {option} {text!r}; need numbers separated by commas, such as 0.5,1") from error


FORMS: dict[Any, Form] = {
    tuple[float, ...]: Form(str | None, numbers, lambda value: ",".join(f"{v:g}" for v in value)),
    tuple[Path, ...]: Form(list[Path] | None, lambda value, _: tuple(value or ()), list),
    tuple[str, ...]: Form(list[str] | None, lambda value, _: tuple(value or ()), list),
    tuple[str, ...] | None: Form(list[str] | None, lambda value, _: tuple(value) if value else None),
}
"""Forms of types that typer cannot parse by itself."""


def docs_of(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass and its bases, joined to one line."""
    found: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if is_dataclass(c)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def options_of(cls: type) -> Iterator[tuple[Field[Any], Parameter, Form]]:
    """For each field that is an option: the field, typer's parameter for it, and the form of its type.

    The order is that of the dataclass's own parameters: fields that are given by keyword only come last.
    """
    kinds, helps = typing.get_type_hints(cls), docs_of(cls)
    for field in sorted(fields(cls), key=lambda field: field.kw_only is True):
        spelt = field.metadata.get("cli", "")
        if spelt is None:
            continue
        form = FORMS.get(kinds[field.name], Form(kinds[field.name]))
        default = _default(field, form)
        text = _help(helps.get(field.name, ""), field.metadata.get("values", ()))
        if spelt == "argument":
            info: Any = typer.Argument(help=text)
        else:
            info = typer.Option(*_spellings(field.name, kinds[field.name], default, spelt), help=text)
        annotation: Any = Annotated.__class_getitem__((form.typed, info))  # type: ignore[attr-defined]
        yield field, Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation), form


def _help(text: str, values: Collection[str]) -> str:
    if isinstance(values, Mapping) and all(isinstance(meaning, str) for meaning in values.values()):
        return f"{text} {'; '.join(f'{name}: {meaning}' for name, meaning in values.items())}."
    return f"{text} One of: {', '.join(values)}." if values else text


def _default(field: Field[Any], form: Form) -> Any:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is MISSING:
        return Parameter.empty
    optional = isinstance(form.typed, types.UnionType) and type(None) in typing.get_args(form.typed)
    return None if optional and not value else form.written(value)


def _spellings(name: str, kind: Any, default: Any, spelt: str | tuple[str, ...]) -> tuple[str, ...]:
    if spelt:
        return (spelt,) if isinstance(spelt, str) else spelt
    return (f"{_long(name)}/{_long('no_' + name)}" if kind is bool and default is True else _long(name),)


def _long(name: str) -> str:
    return "--" + name.replace("_", "-")


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """`command` for typer, with each dataclass parameter replaced by the options of its fields."""
    given = inspect.signature(command, eval_str=True).parameters
    classes = {name: p.annotation for name, p in given.items() if isinstance(p.annotation, type)}
    bundles = {name: list(options_of(cls)) for name, cls in classes.items() if is_dataclass(cls)}

    @functools.wraps(command)
    def run(**values: Any) -> None:
        made = {name: given[name].annotation(**_taken(values, rows)) for name, rows in bundles.items()}
        command(**made, **{name: value for name, value in values.items() if name in given})

    parameters = [p for name in given for p in _parameters(given[name], bundles.get(name))]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _taken(values: Mapping[str, Any], rows: list[tuple[Field[Any], Parameter, Form]]) -> dict[str, object]:
    return {field.name: form.convert(values[field.name], _typed(field)) for field, _, form in rows}


def _typed(field: Field[Any]) -> str:
    """The spelling of a field's option, such as ``--gate-limit``."""
    spelt = field.metadata.get("cli") or _long(field.name)
    return spelt if isinstance(spelt, str) else str(spelt[0])


def _parameters(own: Parameter, rows: list[tuple[Field[Any], Parameter, Form]] | None) -> list[Parameter]:
    return [own.replace(kind=Parameter.KEYWORD_ONLY)] if rows is None else [parameter for _, parameter, _ in rows]
