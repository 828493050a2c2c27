"""How LMDeploy's users spell command lines, and what that is here, as tables.

Their tutorials mix three generations: modules run by `python3 -m` (0.0), flags with underscores for
everything, also for what has a place of its own (0.1), and places with dashes (0.2 and later). The
rule for all: write `python app.py` (or `lmdesk`) for `lmdeploy`, and for `python` and `python3`.
docs/commands/spelling.md is made of them. A flag that a command has itself always wins.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from backend.errors import UserError

Command = tuple[str, ...]  # such as ("serve", "api_server")

# What stands behind `-m`, and scripts of LMDeploy's repository.
MODULES: dict[str, Command] = {
    "lmdeploy.serve.turbomind.deploy": ("convert",),
    "lmdeploy.turbomind.chat": ("chat", "turbomind"),
    "lmdeploy.pytorch.chat": ("chat", "torch"),
    "lmdeploy.serve.turbomind": ("serve", "gradio"),  # as a tutorial has it; the next is LMDeploy's
    "lmdeploy.serve.gradio.app": ("serve", "gradio"),
    "lmdeploy.app": ("serve", "gradio"),
    "lmdeploy.serve.openai.api_server": ("serve", "api_server"),
    "lmdeploy.serve.openai.api_client": ("serve", "api_client"),
    "lmdeploy.serve.proxy.proxy": ("serve", "proxy"),
    "lmdeploy.lite.apis.calibrate": ("lite", "calibrate"),
    "lmdeploy.lite.apis.auto_awq": ("lite", "auto_awq"),
    "lmdeploy.lite.apis.kv_qparams": ("lite", "kv_qparams"),
    "lmdeploy.lite.apis.smooth_quant": ("lite", "smooth_quant"),
    "benchmark/profile_generation.py": ("benchmark", "profile_generation"),
}
# Other names of commands. Dashes for underscores are understood everywhere.
COMMANDS: dict[Command, str] = {("deploy",): "convert", ("doctor",): "check_env"}
# What a command means that does not say which.
DEFAULTS: dict[Command, str] = {(): "run", ("chat",): "turbomind"}

_MODEL = (("--model", "--model-path"),)
# What has a place here, by the flags that 0.0 and 0.1 have for it, in the order of the places.
PLACES: dict[Command, tuple[tuple[str, ...], ...]] = {
    ("run",): _MODEL,
    ("convert",): (("--model-name",), ("--model-path",)),
    ("chat", "turbomind"): _MODEL,
    ("chat", "torch"): _MODEL,
    ("serve", "api_server"): _MODEL,
    ("serve", "gradio"): (("--model-path-or-server", *_MODEL[0]),),
    ("serve", "api_client"): (("--api-server-url", "--restful-api-url"),),
    ("lite", "calibrate"): _MODEL,
    ("lite", "auto_awq"): _MODEL,
    ("lite", "smooth_quant"): _MODEL,
    ("lite", "kv_qparams"): (("--work-dir",), ("--turbomind-dir",)),
    ("benchmark", "profile_generation"): _MODEL,
    ("benchmark", "profile_throughput"): _MODEL,
}
# Other names of flags, by command and those below it.
FLAGS: dict[Command, dict[str, str]] = {
    (): {"--instance-num": "--max-batch-size", "--sess-len": "--session-len"},
    ("benchmark",): {
        "--input-seqlen": "--prompt-tokens", "--output-seqlen": "--completion-tokens",
        "--test-round": "--rounds", "--warmup-round": "--warmup-rounds",
    },
}  # fmt: skip
# Flags whose values have other names, too.
VALUES: dict[str, tuple[str, dict[str, str]]] = {
    "--backend": ("--kernels", {"turbomind": "auto", "pytorch": "reference"}),
}
# Flags without a meaning here that hinder nothing: left out, and what happens instead is said.
LEFT_OUT: dict[str, str] = {
    "--trust-remote-code": "code that comes with a model is never run here, and none is needed",
}
# Flags for what is not here; going on without it would not be what was asked for.
REFUSED: dict[str, str] = {
    "--adapters": "LoRA adapters are not loaded; merge them into the model's weights first.",
    "--qos-config-path": "There are no classes of users: every key (--api-keys) has the same "
    "share.",
    "--ssl": "The server speaks HTTP; put a web server with your certificate before it, and give "
    "--root-path if it adds a path.",
    "--allow-origins": "Pages of other origins are not let in; serve them from the same one.",
    "--allow-methods": "Pages of other origins are not let in; serve them from the same one.",
    "--allow-headers": "Pages of other origins are not let in; serve them from the same one.",
    "--allow-credentials": "Pages of other origins are not let in; serve them from the same one.",
    "--quant-path": "A model's own files say how it is quantized; leave it out.",
    "--tm-params": "The scales are written as files into the folder that is named; leave it out.",
}


@dataclass
class Words:
    """What stands behind a command, spelled as it is here.

    Attributes:
        argv: flags and places.
        notices: sentences for the user, on flags that were left out.
    """

    argv: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def without_module(argv: list[str]) -> list[str]:
    """A command line with a command in place of `-m MODULE` or a script.

    Raises:
        UserError: the module is none that there is a command for.
    """
    if argv[:1] == ["lmdeploy"] and argv[1:] and not argv[1].startswith("-"):
        argv = argv[1:]  # a line pasted whole
    is_module = argv[:1] == ["-m"]
    name = "".join(argv[1:2]) if is_module else "".join(argv[:1]).removeprefix("./")
    if name in MODULES:
        return [*MODULES[name], *argv[1 + is_module :]]
    if is_module:
        raise UserError(
            f"There is no command for the module {name!r:.80}.",
            "See: python app.py --help",
        )
    return argv


def respell(command: Command, argv: Iterable[str], own: Collection[str]) -> Words:
    """The words behind `command` as it spells them.

    Args:
        own: the command's own flags, which stay what they are.

    Raises:
        UserError: a flag for what is not here, or one without its value.
    """
    words, named = Words(), dict[int, str]()
    places = PLACES.get(command, ())
    left = list(argv)
    while left:
        word = left.pop(0)
        if word == "--":
            words.argv += [word, *left]
            break
        if not word.startswith("--"):
            words.argv.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = "--" + flag.lstrip("-").replace("_", "-")  # a tutorial has ----server_port
        if flag not in own:
            flag = _renamed(command, flag)
        if flag in own:
            words.argv.append(flag + equals + value)
        elif flag in REFUSED:
            raise UserError(f"{flag} is not supported. {REFUSED[flag]}")
        elif flag in LEFT_OUT:
            if not equals and left and left[0].lower() in ("true", "false"):
                del left[0]
            words.notices.append(f"{flag} is left out: {LEFT_OUT[flag]}.")
        elif flag in VALUES:
            name, meanings = VALUES[flag]
            value = value if equals else _value(flag, left)
            words.argv += [name, meanings.get(value, value)]
        elif (place := _place(flag, places)) is not None:
            named[place] = value if equals else _value(flag, left)
        else:
            words.argv.append(flag + equals + value)
    return _put(words, named)


def _renamed(command: Command, flag: str) -> str:
    for length in range(len(command), -1, -1):
        if flag in (table := FLAGS.get(command[:length], {})):
            return table[flag]
    return flag


def _place(flag: str, places: tuple[tuple[str, ...], ...]) -> int | None:
    return next((place for place, flags in enumerate(places) if flag in flags), None)


def _value(flag: str, left: list[str]) -> str:
    if not left or left[0].startswith("--"):
        raise UserError(f"{flag} needs a value.")
    return left.pop(0)


def _put(words: Words, named: dict[int, str]) -> Words:
    """Put what was named by a flag into its place: before what has none, or behind it."""
    values = [named[place] for place in sorted(named)]
    if 0 in named:
        words.argv[:0] = values
    elif values:
        words.argv += values if "--" in words.argv else ["--", *values]
    return words
