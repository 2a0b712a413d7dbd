"""Turns the option parser's messages into one sentence about the option that the user wrote."""

from __future__ import annotations

import ast
import difflib
import importlib
import re
from collections.abc import Iterable, Mapping

from zs_lightning.runs.older import MOVED

NO_MODEL = "no model is given; name a configuration file with --config"
_UNKNOWN = (
    r"Group '(?P<group>[\w.]+)' does not accept option '(?P<option>[\w.]+)'",
    r"Subcommand '\w+' does not accept option '(?P<option>[\w.]+)'",
    r"Option '(?P<option>[\w.]+)' is not accepted",
    r"unrecognized arguments: -*(?P<option>[^\s=]+)",
)
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "NoneType": "null"}


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing if no known word is like it."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.55)
    return f"; did you mean {found[0]}?" if found else ""


def explain(message: str, options: Iterable[str], classes: Mapping[str, Iterable[str]]) -> str:
    """One sentence for a message of jsonargparse.

    Args:
        options: dotted names that the command accepts, outside of class-valued options.
        classes: names of the classes that can stand at an option, by its last word.
    """
    where = _plain(".".join(re.findall(r'Parser key "([^"]+)"', message)))
    owner, core = _core(message)
    if owner.endswith("TrainableModule") or message.endswith("required: fit.model"):
        return NO_MODEL
    for pattern in _UNKNOWN:
        if found := re.search(pattern, core):
            parts = found.groupdict()
            option = ".".join(filter(None, (parts.get("group"), parts["option"])))
            return _unknown(where if owner else "", owner, _plain(option), options)
    if found := re.search(r"arguments are required: ([\w.]+)", core):
        return f"{where}.{found[1]} is missing: {owner.rsplit('.', 1)[-1]} needs it" if owner else f"{found[1]} is missing"
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", core):
        return f"{where}: there is no class {found[1]}.{found[2]}{nearest(found[2], dir(importlib.import_module(found[1])))}"
    name = re.search(r"Expected a dot import path string: (\S+)", core)
    key = where.rsplit(".", 1)[-1]
    if name and key in classes:
        known = list(classes[key])
        return f"{where}: there is no class {name[1]}{nearest(name[1], known) or '; expected ' + _either(known)}"
    if expected := re.findall(r"Expected a (\S.*?)(?:\. Got value: .*|)$", core, re.MULTILINE):
        return f"{where}: expected {_types(expected)}; got {_given(core) or _given(message)}"
    return f"{where}: {' '.join(core.split())}" if where else " ".join(core.split())


def _core(message: str) -> tuple[str, str]:
    """The class whose options are wrong, if any, and what the parser says of it.

    The parser tries each type that an option may have and reports all of them, indented; where it got into a class, that
    branch is the one that the user meant.
    """
    lines = [line for line in message.splitlines() if "Expected a path but" not in line]
    owner, start, end = "", 0, len(lines)
    for i, line in enumerate(lines):
        if found := re.match(r"\s*(?:- )?Problem with given class_path '([\w.]+)'", line):
            owner, start = found[1], i + 1
            after = (n for n in range(start, len(lines)) if lines[n].strip() and _depth(lines[n]) <= _depth(line))
            end = next(after, len(lines))
    core = "\n".join(lines[start:end])
    if found := re.search(r"expects a function or a callable class: .*Namespace\(class_path='([\w.]+)'", core, re.DOTALL):
        owner = found[1]
    return owner, core


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _plain(key: str) -> str:
    """As it is written on the command line: model.group_size, not model.init_args.group_size."""
    return key.replace(".init_args", "").replace("init_args.", "")


def _unknown(where: str, owner: str, option: str, options: Iterable[str]) -> str:
    prefix = f"{where}." if where else ""
    known = [prefix + name for name in class_options(owner)] if owner else list(options)
    of = f" ({owner.rsplit('.', 1)[-1]} has no such option)" if owner else ""
    if option in MOVED and owner.endswith("PolicyRL"):
        return f"unknown option {prefix}{option}{of}; it is {prefix}{MOVED[option]} now"
    return f"unknown option {prefix}{option}{of}{nearest(prefix + option, known)}"


def class_options(class_path: str) -> list[str]:
    """Dotted names of the options of a class and of the dataclasses in it."""
    from jsonargparse import ArgumentParser

    module, _, name = class_path.rpartition(".")
    parser = ArgumentParser()
    parser.add_class_arguments(getattr(importlib.import_module(module), name), fail_untyped=False)
    return [action.dest for action in parser._actions if action.dest != "help"]


def _types(expected: list[str]) -> str:
    names: list[str] = []
    for text in expected:
        if literal := re.fullmatch(r"typing\.Literal(\[.*\])", text):
            names += [str(value) for value in ast.literal_eval(literal[1])]
        elif kind := re.fullmatch(r"<class '([\w.]+)'>", text):
            names.append(_TYPES.get(kind[1], f"a {kind[1].rsplit('.', 1)[-1]}"))
        elif not text.startswith("dot import path string"):
            names.append(text)
    if set(names) <= {"null"}:
        names.insert(0, "a group of options")
    return _either(list(dict.fromkeys(names)))


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _given(text: str) -> str:
    found = re.search(r"(?:Got|Given) value: (?!Namespace|NestedArg)(.*?)(?:\. Got value: .*)?$", text, re.MULTILINE)
    found = found or re.search(r"Given value: NestedArg\(.*val='(.*)'\)", text)
    return found[1] if found else "something else"
