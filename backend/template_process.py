"""The process that runs a chat template: `python -m backend.template_process`.

Chat templates are programs that come with models. Jinja's sandbox keeps them from Python's
internals, but not from eating time and memory (measured: `'a' * 5e8` takes 12 s and 1.9 GB), so
this process bounds both for itself, and `chat_template` can kill it.

One JSON object a line. The first one in is {"source", "variables", "seconds", "memory"}, answered
by {}; then each {"messages", "add_generation_prompt", "max_chars"} by {"text"}. What goes wrong is
answered by {"kind", "text"}. The end of the input ends the process, so it never outlives its
parent. Beyond its CPU time it dies by SIGPROF, without an answer.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

try:
    import resource
except ImportError:  # not on Windows; there only the parent's patience is bounded
    resource = None  # type: ignore[assignment]


class Refusal(jinja2.TemplateError):
    """The template called raise_exception."""


class TooLongError(Exception):
    """The template wrote more than it may."""


class GenerationTag(Extension):
    """{% generation %}: marks what the assistant said, for training. Here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class SafeNamespace(Namespace):
    """Without underscored names, which can pose as Python's own. So does transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=...)` is legal
        self, *rest = args
        given = dict(*rest, **kwargs)
        for name in given:
            SafeNamespace._check(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        SafeNamespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.TemplateError(f"a namespace cannot hold {name!r}")


def raise_exception(message: Any) -> None:
    raise Refusal(str(message))


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
        sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates (`_compile_jinja_template`)."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"])
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now,
                    "namespace": SafeNamespace}
    return env


def limit_memory(extra: int) -> None:
    """Allow `extra` bytes of address space above what is in use now."""
    statm = Path("/proc/self/statm")
    if resource is not None and statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + extra, used + extra))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextmanager
def cpu_time(seconds: float) -> Iterator[None]:
    """Die if the body takes more CPU time, in Python or below; a busy machine does not count."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def render(
    template: jinja2.Template, variables: dict[str, Any], request: dict[str, Any]
) -> dict[str, str]:
    """The answer to one request.

    `tools` and `documents` are always defined, as with transformers.
    """
    pieces, room = [], request["max_chars"]
    for piece in template.generate(
        **variables, messages=request["messages"], tools=None, documents=None,
        add_generation_prompt=request["add_generation_prompt"],
    ):
        room -= len(piece)
        if room < 0:
            raise TooLongError
        pieces.append(piece)
    return {"text": "".join(pieces)}


def describe(error: Exception) -> dict[str, str]:
    """An error of the template as an answer."""
    text = (str(error) or type(error).__name__)[:500]
    match error:
        case MemoryError():
            return {"kind": "memory", "text": ""}
        case TooLongError():
            return {"kind": "output", "text": ""}
        case Refusal():
            return {"kind": "refused", "text": text}
        case jinja2.TemplateSyntaxError():
            return {"kind": "syntax", "text": f"line {error.lineno}: {text}"}
        case _:
            return {"kind": "failed", "text": text}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started us
    lines, out = sys.stdin.buffer, sys.stdout.buffer

    def answer(value: dict[str, str]) -> None:
        out.write(json.dumps(value).encode() + b"\n")
        out.flush()

    start = json.loads(lines.readline())
    seconds = start["seconds"]
    env = environment()
    limit_memory(start["memory"])
    try:
        with cpu_time(seconds):
            template = env.from_string(start["source"])
    except Exception as error:  # a checkpoint's template can fail in any way
        answer(describe(error))
        return
    answer({})
    for line in lines:
        request = json.loads(line)
        try:
            with cpu_time(seconds):
                result = render(template, start["variables"], request)
        except Exception as error:  # the same
            result = describe(error)
        answer(result)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        pass  # the parent is gone
