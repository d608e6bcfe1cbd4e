"""BDDL task files, read far enough to say in one line what LIBERO would stumble over: what is unknown or undeclared, and where.

LIBERO's own parser evaluates rotations as Python: files that hold more than numbers and pi there are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from difflib import get_close_matches

from common.cli import UserError

# Predicate -> number of arguments: what LIBERO's environments judge (goal) and set up (init).
PREDICATES = {"in": 2, "on": 2, "open": 1, "close": 1, "turnon": 1, "turnoff": 1}
# Problem -> what its scene stands on: the name of that fixture, which comes with the scene, and its category.
WORKSPACES = {
    "libero_tabletop_manipulation": ("main_table", "table"),
    "libero_floor_manipulation": ("floor", "floor"),
    "libero_coffee_table_manipulation": ("coffee_table", "coffee_table"),
    "libero_living_room_tabletop_manipulation": ("living_room_table", "living_room_table"),
    "libero_study_tabletop_manipulation": ("study_table", "study_table"),
    "libero_kitchen_tabletop_manipulation": ("kitchen_table", "kitchen_table"),
}
SECTIONS = (":regions", ":fixtures", ":objects", ":init", ":goal")
_ANGLE = re.compile(r"[-+*/.()0-9\s]|pi")


class Word(str):
    """A token in lower case, as LIBERO takes it, and the line that it stands in."""

    line: int

    def __new__(cls, text: str, line: int):
        word = super().__new__(cls, text.lower())
        word.line = line
        return word


def check_bddl(text: str, name: str, categories: Collection[str]) -> None:
    """Raise UserError ("NAME:LINE: what is wrong") if a task file is not one that LIBERO can build.

    `categories`: of objects and fixtures that there are classes for.
    """
    try:
        _check(_parse(text, name), name, categories)
    except (TypeError, IndexError, ValueError) as error:  # parentheses where words are expected, or the other way round
        raise UserError(f"{name}: its parts are not laid out as in LIBERO's files ({error})") from error


def _check(tokens: list, name: str, categories: Collection[str]) -> None:
    def wrong(where, what: str) -> UserError:
        return UserError(f"{name}:{_line(where)}: {what}")

    def known(word: Word, names: Collection[str], what: str) -> None:
        if word not in names:
            near = get_close_matches(word, names, n=3, cutoff=0.6) or sorted(names)[:8]
            raise wrong(word, f"unknown {what} {word!s}; {'did you mean' if len(near) <= 3 else 'there are'} {', '.join(near)}?")

    (define,) = tokens
    if not define or define[0] != "define":
        raise wrong(define, "not a task: (define (problem ...) ...) is expected")
    groups = {str(group[0]): group for group in define[1:] if isinstance(group, list) and group and isinstance(group[0], Word)}
    for needed in ("problem", ":language", *SECTIONS):
        if needed not in groups:
            raise wrong(define, f"the section ({needed} ...) is missing")
    if len(groups["problem"]) != 2 or len(groups[":goal"]) != 2 or not isinstance(groups[":goal"][1], list):
        raise wrong(groups["problem"], "(problem NAME) and (:goal (And ...)) are expected")
    known(problem := groups["problem"][1], WORKSPACES, "problem class")
    workspace, ground = WORKSPACES[problem]

    declared: dict[str, Word] = {}
    for section in (":fixtures", ":objects"):
        for names, category in _declarations(groups[section][1:], wrong):
            if section == ":objects":
                known(category, categories, "object category")
            else:
                known(category, {*categories, ground}, "fixture category")
            for word in names:
                if word in declared:
                    raise wrong(word, f"{word} is declared twice (also in line {declared[word].line})")
                declared[str(word)] = word
    if workspace not in declared:
        raise wrong(groups[":fixtures"], f"{problem} needs its {workspace} among the fixtures: {workspace} - {ground}")

    regions, lost = set(), {}  # region -> its target, which is not declared: LIBERO's own files have such, unused
    for region in groups[":regions"][1:]:
        parts = {str(part[0]): part for part in region[1:] if isinstance(part, list) and part}
        if not isinstance(region, list) or ":target" not in parts or len(parts[":target"]) != 2:
            raise wrong(region, "a region needs a name and (:target NAME)")
        target = parts[":target"][1]
        if unknown := [key for key in parts if key not in (":target", ":ranges", ":yaw_rotation", ":rgba")]:
            raise wrong(parts[unknown[0]], f"unknown attribute {unknown[0]} of a region; there are :target, :ranges, :yaw_rotation, :rgba")
        for key, count in ((":ranges", 4), (":yaw_rotation", 2)):
            for numbers in parts.get(key, [key, []])[1]:
                rest = [_angle(word) if key == ":yaw_rotation" else _number(word) for word in numbers]
                if len(rest) != count or any(rest):
                    raise wrong(numbers, f"{key} holds lists of {count} numbers")
        if target == workspace and not parts.get(":ranges"):
            raise wrong(region, f"a region of {workspace} needs its (:ranges ((x0 y0 x1 y1)))")
        if target in declared:
            regions.add(f"{target}_{region[0]}")
        else:
            lost[f"{target}_{region[0]}"] = target

    goal = groups[":goal"][1]
    goal = goal[1:] if goal and goal[0] == "and" else [goal]
    for section, predicates in (("init", groups[":init"][1:]), ("goal", goal)):
        if section == "goal" and not predicates:
            raise wrong(groups[":goal"], "the goal is empty")
        for predicate in predicates:
            if not isinstance(predicate, list) or not predicate or not all(isinstance(word, Word) for word in predicate):
                raise wrong(predicate, f"a predicate of the {section} is (Name argument ...), of which there are {', '.join(PREDICATES)}")
            known(predicate[0], PREDICATES, f"predicate in the {section}:")
            if len(predicate) - 1 != PREDICATES[predicate[0]]:
                raise wrong(predicate, f"{predicate[0]} takes {PREDICATES[predicate[0]]} arguments, not {len(predicate) - 1}")
            first, *second = predicate[1:]
            if word := next((word for word in predicate[1:] if word in lost), None):
                raise wrong(word, f"the target of region {word}, {lost[word]}, is neither among the fixtures nor the objects")
            known(first, {*declared} | (set() if second else regions), f"object in the {section}:")
            for word in second:
                known(word, {*declared, *regions}, f"object or region in the {section}:")
            if section == "goal" and predicate[0] == "in" and predicate[2] not in regions:
                raise wrong(
                    predicate, f"In needs a region, which {predicate[2]} is not: LIBERO cannot evaluate it; take On, or name a region"
                )


def language_of(text: str) -> str:
    """What a task is told, in lower case, as LIBERO's environment gives it."""
    return " ".join(re.search(r"\(:language\s+([^)]*)\)", text)[1].lower().split())


def _parse(text: str, name: str) -> list:
    """Nested lists of Words. UserError if parentheses do not match."""
    open_lists: list[tuple[list, int]] = []
    tokens: list = []
    for number, line in enumerate(text.splitlines(), start=1):
        for token in re.findall(r"[()]|[^\s()]+", line.partition(";")[0]):
            if token == "(":
                open_lists.append((tokens, number))
                tokens = []
            elif token != ")":
                tokens.append(Word(token, number))
            elif open_lists:
                (outer, _), inner = open_lists.pop(), tokens
                outer.append(inner)
                tokens = outer
            else:
                raise UserError(f"{name}:{number}: a ) too many")
    if open_lists:
        raise UserError(f"{name}:{open_lists[-1][1]}: this ( is never closed")
    if len(tokens) != 1 or not isinstance(tokens[0], list):
        raise UserError(f"{name}:1: not a task: (define (problem ...) ...) is expected, once")
    return tokens


def _declarations(words: list, wrong) -> Iterator[tuple[list[Word], Word]]:
    """`a b - category` -> ([a, b], category), one after the other."""
    names: list[Word] = []
    rest = iter(words)
    for word in rest:
        if isinstance(word, list):
            raise wrong(word, "NAME ... - CATEGORY is expected")
        if word != "-":
            names.append(word)
            continue
        category = next(rest, None)
        if not names or not isinstance(category, Word):
            raise wrong(word, "NAME ... - CATEGORY is expected")
        yield names, category
        names = []
    if names:
        raise wrong(names[0], f"{names[0]} has no category: {names[0]} - CATEGORY")


def _angle(word) -> str:
    """What is left of an expression without numbers, pi and arithmetic."""
    return _ANGLE.sub("", word) if isinstance(word, Word) else "?"


def _number(word) -> str:
    try:
        return "" if float(word) == float(word) else "nan"
    except (TypeError, ValueError):
        return "?"


def _line(where) -> int:
    while isinstance(where, list):
        where = next((part for part in where if isinstance(part, Word) or part), 1)
    return getattr(where, "line", 1)
