"""Turns the option parser's messages into one sentence about the option that the user wrote."""

import ast
import difflib
import pkgutil
import re
from collections.abc import Iterable, Mapping

from zs_lightning.runs.older import MOVED

NO_MODEL = "no model is given; name a configuration file with --config"
_UNKNOWN = re.compile(
    r"(?:Group '(?P<group>[\w.]+)'|Subcommand '\w+') does not accept option '(?P<of>[\w.]+)'"
    r"|Option '(?P<option>[\w.]+)' is not accepted"
    r"|unrecognized arguments: -*(?P<word>[^\s=]+)"
)
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing if no known word is like it."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.55)
    return f"; did you mean {found[0]}?" if found else ""


def explain(message: str, options: Iterable[str], classes: Mapping[str, Iterable[str]]) -> str:
    """One sentence for a message of jsonargparse: of ours for the commonest mistakes, else its own
    words.

    Args:
        options: dotted names that the command accepts, outside of class-valued options.
        classes: names of the classes that can stand at an option, by its last word.
    """
    # Inside of a class the parser names each level; together they are the option's place.
    where = _plain(".".join(_keys(message)))
    owner, core = _core(message)
    if owner.endswith("TrainableModule") or message.endswith("required: fit.model"):
        return NO_MODEL
    if found := _UNKNOWN.search(core):
        option = _plain(".".join(filter(None, found.groups())))
        return _unknown(where if owner else "", owner, option, options)
    if found := re.search(r"arguments are required: ([\w.]+)", core):
        who = owner.rsplit(".", 1)[-1]
        return f"{where}.{found[1]} is missing: {who} needs it" if who else f"{found[1]} is missing"
    name = re.search(r"Expected a dot import path string: (\S+)", core)
    if name and (known := list(classes.get(where.rsplit(".", 1)[-1], []))):
        instead = nearest(name[1], known) or f"; expected {_either(known)}"
        return f"{where}: there is no class {name[1]}{instead}"
    if expected := re.findall(r"Expected a (\S.*?)(?:\. Got value: .*|)$", core, re.MULTILINE):
        given = _given(core) or _given(message) or "something else"
        return f"{where}: expected {_types(expected)}; got {given}"
    return f"{where}: {' '.join(core.split())}" if where else " ".join(core.split())


def _keys(message: str) -> list[str]:
    """The keys that lead to the mistake, from the outermost to the innermost."""
    keys: list[str] = []
    deepest = -1
    for line in message.splitlines():
        found = re.findall(r'Parser key "([^"]+)"', line)
        # Each type that an option may have names its keys anew, at the same depth.
        if found and _depth(line) > deepest:
            keys += found
            deepest = _depth(line)
    return keys


def _core(message: str) -> tuple[str, str]:
    """The class whose options are wrong, if any, and what the parser says of it."""
    lines = [line for line in message.splitlines() if "Expected a path but" not in line]
    owner = ""
    # The parser tries each type that an option may have and reports all of them, indented. Where
    # it got into a class, that branch is the one that the user meant.
    for line in list(lines):
        found = re.match(r"\s*(?:- )?Problem with given class_path '([\w.]+)'", line)
        # Not in a branch that the one before has cut off.
        if found and line in lines:
            owner = found[1]
            lines = lines[lines.index(line) + 1 :]
            for number, other in enumerate(lines):
                if other.strip() and _depth(other) <= _depth(line):
                    lines = lines[:number]
                    break
    core = "\n".join(lines)
    called = r"expects a function or a callable class: .*Namespace\(class_path='([\w.]+)'"
    if found := re.search(called, core, re.DOTALL):
        owner = found[1]
    return owner, core


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _plain(key: str) -> str:
    """The key as a command line has it: model.group_size, not model.init_args.group_size."""
    return key.replace(".init_args", "").replace("init_args.", "")


def _unknown(where: str, owner: str, option: str, options: Iterable[str]) -> str:
    prefix = f"{where}." if where else ""
    said = f"unknown option {prefix}{option}"
    if not owner:
        return f"{said}{nearest(option, options)}"
    said += f" ({owner.rsplit('.', 1)[-1]} has no such option)"
    if option in MOVED and owner.endswith("PolicyRL"):
        return f"{said}; it is {prefix}{MOVED[option]} now"
    return f"{said}{nearest(prefix + option, [prefix + name for name in class_options(owner)])}"


def class_options(class_path: str) -> list[str]:
    """Dotted names of the options of a class and of the dataclasses in it."""
    from jsonargparse import ArgumentParser

    # A parser of its own: the one that failed does not say what it would have taken.
    parser = ArgumentParser()
    parser.add_class_arguments(pkgutil.resolve_name(class_path), fail_untyped=False)
    return [action.dest for action in parser._actions if action.dest != "help"]


def _types(expected: list[str]) -> str:
    names: list[str] = []
    for text in expected:
        if literal := re.fullmatch(r"typing\.Literal(\[.*\])", text):
            names += [str(value) for value in ast.literal_eval(literal[1])]
        elif kind := re.fullmatch(r"<class '(?:[\w.]+\.)?(\w+)'>", text):
            names.append("null" if kind[1] == "NoneType" else _TYPES.get(kind[1], f"a {kind[1]}"))
        elif not text.startswith("dot import path string"):
            names.append(text)
    # Of a dataclass the parser says nothing but what else may stand there.
    if set(names) <= {"null"}:
        names.insert(0, "a group of options")
    return _either(list(dict.fromkeys(names)))


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _given(text: str) -> str:
    plain = r"(?:Got|Given) value: (?!Namespace|NestedArg)(.*?)(?:\. Got value: .*)?$"
    found = re.search(plain, text, re.MULTILINE)
    found = found or re.search(r"Given value: NestedArg\(.*val='(.*)'\)", text)
    return found[1] if found else ""
