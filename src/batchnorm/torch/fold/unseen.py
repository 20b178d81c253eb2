"""What code does to placeholders that they do not notice, seen while it runs.

Whether two values are the same object (``x is None``) is asked of no method of theirs, and an
exception that is caught leaves no trace. So the code of models is looked at when it is called: a
function that catches is noted, and before each ``is`` its operands are.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import gc
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, ModuleType
from typing import Any, Final, NamedTuple, TypeVar

from torch import fx, nn

__all__ = ["TYPE", "seen"]

_CATCHING = {"CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH", "CHECK_EG_MATCH"}
_CATCHES = "it catches exceptions, which may depend on values"
_UNKNOWN = object()
#: Of how many operands these make another, which is not looked into.
_BUILT = {"BINARY_SUBSCR": 2, "BINARY_OP": 2}
_SUPPRESS = contextlib.suppress.__exit__.__code__

#: Stands for ``type(value)`` of a placeholder.
TYPE: Final = object()

T = TypeVar("T")
#: Returns an operand, given the frame.
Operand = Callable[[Any], Any]


class _Asks(NamedTuple):
    problem: str
    identities: dict[int, tuple[Operand, Operand]]


def seen(
    function: Callable[[], T],
    is_of_models: Callable[[str], bool],
    note: Callable[[str, Any], None],
    identity: Callable[[Any, Any, Any], None],
) -> T:
    """Call a function, and the others below with what code of models does there.

    Parameters
    ----------
    is_of_models
        Whether a file is one of models.
    note
        Gets what makes it impossible to follow, and the frame.
    identity
        Gets both operands of an ``is``, if they are known, and the frame; or TYPE and None, where
        the type of a placeholder is asked for.
    """

    def enter(frame: Any, event: str, arg: Any) -> Any:
        code = frame.f_code
        if code is _SUPPRESS:
            note(_CATCHES, frame)
        if not is_of_models(code.co_filename):
            return None
        asks = _asks(code)
        if asks.problem:
            note(asks.problem, frame)
        if not asks.identities:
            return None

        def before(frame: Any, event: str, arg: Any) -> Any:
            pair = asks.identities.get(frame.f_lasti) if event == "opcode" else None
            if pair is not None:
                one, other = (operand(frame) for operand in pair)
                if one is not _UNKNOWN and other is not _UNKNOWN:
                    identity(one, other, frame)
            return before

        frame.f_trace_lines = False
        frame.f_trace = before  # before the next, for Python 3.13
        frame.f_trace_opcodes = True
        return before

    usual, collects = sys.gettrace(), gc.isenabled()
    gc.disable()  # or finalizers of anything would be seen as code of the model
    sys._getframe().f_trace_opcodes = True  # without which Python 3.12 never traces them
    sys.settrace(enter)
    try:  # in a frame that other tracers know, as those of coverage
        return function()
    finally:
        sys.settrace(usual)
        if collects:
            gc.enable()


@cache
def _asks(code: CodeType) -> _Asks:
    instructions = [*_single(code)]
    identities: dict[int, tuple[Operand, Operand]] = {}
    for place, each in enumerate(instructions):
        if each.opname == "IS_OP":
            other, start = _operand(instructions, place - 1)
            identities[each.offset] = _operand(instructions, start)[0], other
        elif "JUMP" in each.opname and each.opname.endswith("_NONE"):
            identities[each.offset] = _operand(instructions, place - 1)[0], lambda frame: None
        elif (only := _asked_for_its_type(instructions, place)) is not None:
            identities[each.offset] = only, lambda frame: None
    # __getattr__ catches what says that an attribute is elsewhere.
    problem = _CATCHES if code.co_name != "__getattr__" and _catches(code) else ""
    if any(each.opname == "STORE_GLOBAL" for each in instructions):
        problem = problem or "it sets a global name, on which its path may depend"
    return _Asks(problem, identities)


class _Instruction(NamedTuple):
    opname: str
    argval: Any
    offset: int


def _single(code: CodeType) -> Iterator[_Instruction]:
    """The instructions; those that load two variables as two."""
    for each in dis.get_instructions(code):
        names = each.argval if isinstance(each.argval, tuple) else None
        if names is not None and each.opname.startswith("LOAD_FAST"):
            yield from (_Instruction("LOAD_FAST", name, each.offset) for name in names)
        else:
            yield _Instruction(each.opname, each.argval, each.offset)


def _operand(instructions: list[_Instruction], place: int) -> tuple[Operand, int]:
    """What the instructions up to `place` load, and the place before them."""
    if place < 0:
        return lambda frame: _UNKNOWN, -1
    name, value = instructions[place].opname, instructions[place].argval
    if name.startswith("LOAD_CONST"):
        return lambda frame: value, place - 1
    if name.startswith("LOAD_FAST") or name in ("LOAD_DEREF", "LOAD_NAME"):
        return lambda frame: frame.f_locals.get(value, _UNKNOWN), place - 1
    if name == "LOAD_GLOBAL":
        given = vars(builtins)
        return lambda frame: frame.f_globals.get(value, given.get(value, _UNKNOWN)), place - 1
    if name == "LOAD_ATTR":
        base, start = _operand(instructions, place - 1)
        return lambda frame: _attribute(base(frame), value), start
    if name in _BUILT or name == "BUILD_TUPLE":
        for _ in range(_BUILT.get(name, value)):
            place = _operand(instructions, place - 1)[1] + 1
        return lambda frame: _UNKNOWN, place - 1
    return lambda frame: _UNKNOWN, -1


def _asked_for_its_type(instructions: list[_Instruction], place: int) -> Operand | None:
    """What ``type(...)`` is called with here, unless it becomes text, as in messages; else None."""
    name, value, _ = instructions[place]
    if name not in ("CALL", "CALL_FUNCTION") or value != 1:
        return None
    before = place - 1 - (instructions[place - 1].opname == "PRECALL")
    only, start = _operand(instructions, before)
    callee = instructions[start] if start >= 0 else None
    if callee is None or (callee.opname, callee.argval) != ("LOAD_GLOBAL", "type"):
        return None
    after = [each.opname for each in instructions[place + 1 : place + 3]]
    if any(each.startswith(("FORMAT", "CONVERT")) for each in after):
        return None
    return lambda frame: _type_of(only(frame))


def _type_of(value: Any) -> Any:
    known = value is not _UNKNOWN and not issubclass(type(value), fx.Proxy)
    return _UNKNOWN if known else TYPE


def _attribute(base: Any, name: str) -> Any:
    if isinstance(base, (fx.Proxy, nn.Module, type, ModuleType)):
        return getattr(base, name, _UNKNOWN)
    return getattr(base, "__dict__", {}).get(name, _UNKNOWN)


def _catches(code: CodeType) -> bool:
    """Whether this may catch an exception, as the end of a with block does by what it returns."""
    instructions = [*dis.get_instructions(code)]
    names = [each.opname for each in instructions]
    for place, (name, each) in enumerate(zip(names, instructions, strict=True)):
        before = names[place - 1] if place else ""
        if name in _CATCHING or (before, name) == ("PUSH_EXC_INFO", "POP_TOP"):
            return True
        # Of Python 3.10: the begin of `except:`, if it is not the end of a with block.
        three = names[place : place + 3] == ["POP_TOP"] * 3
        if sys.version_info < (3, 11) and three and before != "RERAISE":
            return True
        if code.co_name == "__exit__" and name in ("RETURN_VALUE", "RETURN_CONST"):
            constant = instructions[place - 1] if name == "RETURN_VALUE" else each
            if "CONST" not in constant.opname or constant.argval:
                return True
    return False
