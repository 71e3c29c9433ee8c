"""What to say of a command line that makes no sense: what was got, what was expected, what was probably meant.

All of it is derived from the options and arguments that the verb declares.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from typing import TYPE_CHECKING

import click

from patcher.cli.output import shortened
from patcher.cli.values import Version, named_files
from patcher.wording import listing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["explained", "leniently"]

_NEAR = 0.6
"""How much of two options' names must be the same, in order, for one to be taken for the other."""
_SHORTEST = 2
"""The fewest letters that are taken for the beginning of an option's name."""
_LONGEST = 200
_MOST = 2
"""Words left over that one change may explain: an option without its dashes, and its value."""
_FILE = re.compile(r"\S+\.[A-Za-z]\w*")
_SHAPES = {
    "NAME": re.compile(r"[A-Za-z]\w*(-\w+)*"),
    "MODEL": re.compile(r"\S+"),
    "HOST:PORT": re.compile(r"[^\s:]+:\d+"),
    "START:END:STEP": re.compile(r"[\d.]+(:[\d.]+){0,2}"),
}
"""What the value of an option looks like, by its metavar."""
_UNLIKELY = ("key_", "tls_", "watch")
"""How the names of options begin for which nobody means a word that stands alone."""


def leniently(command: click.Command, words: Sequence[str], name: str, parent: click.Context | None) -> click.Context:
    """Parse ``words`` as the command would, but ignore mistakes; the context's ``args`` are the words left over."""
    return command.make_context(
        name,
        list(words),
        parent=parent,
        resilient_parsing=True,
        ignore_unknown_options=True,
        allow_extra_args=True,
    )


def explained(error: click.ClickException, arguments: Sequence[str]) -> str:
    """The message of an error that click found in ``arguments``, the words after ``patcher``."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return error.format_message()
    if isinstance(error, click.NoSuchOption):
        return _no_option(error.option_name, context, arguments)
    if isinstance(error, click.BadParameter) and not isinstance(error, click.MissingParameter):
        return f"{_name(error.param)}: {error.message}" if error.param else error.format_message()
    if context.parent is None:
        return error.format_message()
    words = arguments[arguments.index(str(context.info_name)) + 1 :]
    if extra := _parsed(context, words).args:
        said = _too_many(context, words, extra)
    elif isinstance(error, click.MissingParameter) and error.param:
        said = _missing(error.param, context)
    else:
        said = error.format_message()
    return said + _after_dashes(context, words)


def _no_option(name: str, context: click.Context, arguments: Sequence[str]) -> str:
    # click names only the first letter of `-version`.
    word = next((word for word in arguments if word.startswith(name)), name).partition("=")[0]
    said = f"there is no option {shortened(word)!r}"
    if re.search(r"^-\d|\s", word):
        return f"{said}; put `--` before words that begin with -"
    if near := _near(word.lstrip("-"), context.command):
        return f"{said}; did you mean {' or '.join(near)}?"
    if context.parent is None:
        return f"{said} before the verb: a verb's options follow it; `patcher VERB --help` lists them"
    return f"{said}; `{context.command_path} --help` lists the options"


def _near(bare: str, command: click.Command) -> list[str]:
    options = [name for option in _options(command) for name in (*option.opts, *option.secondary_opts)]
    there = [name.removeprefix("--") for name in options if name.startswith("--")]
    begin = [name for name in there if len(bare) >= _SHORTEST and (name.startswith(bare) or bare.startswith(name))]
    found = begin or difflib.get_close_matches(bare, there, 2, _NEAR)
    return [f"--{name}" for name in found]


def _missing(param: click.Parameter, context: click.Context) -> str:
    lists = "; `patcher history` lists the versions" if isinstance(param.type, Version) else ""
    required = [f"{_name(each)} {_value(each)}" for each in _options(context.command) if each.required]
    pattern = " ".join([context.command_path, *map(_value, _taken(context.command)), *required])
    return f"{_name(param)} is missing; expected `{pattern}`{lists}"


def _too_many(context: click.Context, words: Sequence[str], extra: Sequence[str]) -> str:
    taken = _taken(context.command)
    takes = f"{' '.join(map(_value, taken))} and options" if taken else "only options"
    said = f"`{context.command_path}` takes {takes}; got also {listing([repr(shortened(word)) for word in extra])}"
    if meant := next(_meant(context, words, extra), ""):
        return f"{said}; did you mean {meant}?"
    if _takes_names(context.command):
        return f"{said}; put quotes around a name with spaces{', and give one at a time' if len(taken) == 1 else ''}"
    return f"{said}; `{context.command_path} --help` lists the options"


def _meant(context: click.Context, words: Sequence[str], extra: Sequence[str]) -> Iterator[str]:
    """Commands that leave no word over, since one of ``extra`` becomes an option or gets an option before it."""
    given = _parsed(context, words)
    free = [each for each in _options(context.command) if each.multiple or not _is_given(each, given)]
    for word in extra if len(extra) <= _MOST else ():
        for option in free:
            if f"--{word}" in option.opts and (told := _with(context, words, word, [f"--{word}"], option)):
                yield f"`{told}`"
        fitting = [each for each in free if _fits(each, word, context.command)]
        # A number that no version has is more likely to be meant for something else.
        fitting.sort(key=lambda each: isinstance(each.type, Version) and word not in _offered(each, given))
        if fitting and (told := _with(context, words, word, [_name(fitting[0]), word], fitting[0])):
            others = ", ".join(map(_name, fitting[1:]))
            yield f"`{told}`" + (f" (or {others})" if others else "")


def _with(context: click.Context, words: Sequence[str], word: str, instead: list[str], option: click.Option) -> str:
    """The command with ``instead``, which sets ``option``, in place of ``word``; empty if a word is still left over."""
    for place in reversed([place for place, each in enumerate(words) if each == word]):
        changed = [*words[:place], *instead, *words[place + 1 :]]
        parsed = _parsed(context, changed)
        if _is_given(option, parsed) and not parsed.args:
            command = f"{context.command_path} {shlex.join(changed)}"
            return command if len(command) <= _LONGEST else f"{context.command_path} … {shlex.join(instead)}"
    return ""


def _fits(option: click.Option, word: str, command: click.Command) -> bool:
    from patcher.storage import is_url

    kind = option.type
    if option.is_flag or str(option.name).startswith(_UNLIKELY):
        return False
    if isinstance(kind, click.Path):
        if kind.file_okay:
            return _is_file(word)
        return is_url(word) or os.path.isdir(word)  # noqa: PTH112  Path.is_dir raises an error for a long word
    if isinstance(kind, click.types.StringParamType):
        shape = _SHAPES.get(option.metavar or "")
        return bool(shape and shape.fullmatch(word)) and not (option.metavar == "NAME" and _takes_names(command))
    try:
        kind.convert(word, option, None)
    except click.BadParameter:
        return False
    return True


def _is_file(word: str) -> bool:
    return bool(_FILE.fullmatch(word)) or named_files([word])


def _after_dashes(context: click.Context, words: Sequence[str]) -> str:
    """A hint if an option follows ``--``, where every word is taken as it is."""
    names = {name for each in context.command.params for name in each.opts}
    late = [word for word in words[words.index("--") :] if word.partition("=")[0] in names] if "--" in words else []
    return f"; {late[0]} follows `--`, where no word is an option: put options before `--`" if late else ""


def _parsed(context: click.Context, words: Sequence[str]) -> click.Context:
    return leniently(context.command, words, str(context.info_name), context.parent)


def _is_given(option: click.Option, context: click.Context) -> bool:
    return context.get_parameter_source(str(option.name)) is click.core.ParameterSource.COMMANDLINE


def _offered(option: click.Option, context: click.Context) -> list[str]:
    return [str(each.value) for each in option.shell_complete(context, "")]


def _options(command: click.Command) -> list[click.Option]:
    """The options that the help of the command shows."""
    return [each for each in command.params if isinstance(each, click.Option) and not each.hidden]


def _taken(command: click.Command) -> list[click.Argument]:
    return [each for each in command.params if isinstance(each, click.Argument)]


def _takes_names(command: click.Command) -> bool:
    return any(isinstance(each.type, click.types.StringParamType) for each in _taken(command))


def _name(param: click.Parameter) -> str:
    return max(param.opts, key=len) if isinstance(param, click.Option) else param.human_readable_name


def _value(param: click.Parameter) -> str:
    value = param.human_readable_name if isinstance(param, click.Argument) else param.metavar or param.type.name.upper()
    return f"{value}..." if param.nargs == -1 and not value.endswith("...") else value
