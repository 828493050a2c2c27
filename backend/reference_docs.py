"""docs/configuration.md and docs/commands/spelling.md: what the code has in tables, for people, in
English and in Chinese. `make docs` writes the pages; docs/commands/zh.json has the Chinese of each
text by its English.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path

from backend.command_docs import FOLDER, Translate, chinese
from backend.command_spelling import (
    COMMANDS,
    DEFAULTS,
    FLAGS,
    LEFT_OUT,
    MODULES,
    PLACES,
    REFUSED,
    VALUES,
)
from backend.config import ChatConfig, EngineConfig, SamplingParams, ServerConfig

ABOUT_SETTINGS = (
    "Every setting, made from `backend/config.py` by `make docs`. On the command line it is "
    "spelled `--its-name`, in a request body of the API `its_name`.",
    "EngineConfig's can be kept for a model: `config set MODEL quant_policy=8`, or the page's "
    "Config tab. A workspace keeps them in its [config.ini](config_ini.md); those of a plain "
    "folder, which may be shared, are in `settings/` of the user's data directory (`LMDESK_HOME`, "
    "else `~/.local/share/lmdesk`). One order everywhere: a flag that is given, then the file, "
    "then the default; `config show MODEL` tells which it was. `config memory MODEL` tells what "
    "the memory will hold, `config undo MODEL` takes up to twenty changes back.",
)
ABOUT_SPELLINGS = (
    "Made from `backend/command_spelling.py` by `make docs`.",
    "Write `python app.py` (or `lmdesk`) where a tutorial has `lmdeploy`, `python` or `python3`; "
    "the rest of the line stays as it is. A line of `lmdeploy` pasted whole behind `python app.py` "
    "works, too. Underscores and dashes are the same in flags and commands, and one dash too many "
    "is none. A flag that no command has is an error, answered with the nearest one.",
)


def pages() -> dict[Path, str]:
    """Every page, by its file."""
    other = chinese()

    def english(text: str) -> str:
        return text

    def translated(text: str) -> str:
        return other.get(text, text)

    found = {}
    for name, make in (("../configuration", _configuration), ("spelling", _spelling)):
        for suffix, link, say in (
            ("", "[中文]({}.zh.md)", english), (".zh", "[English]({}.md)", translated),
        ):
            title, *rest = make(say)
            head = [f"# {title}", "", link.format(Path(name).name)]
            found[(FOLDER / f"{name}{suffix}.md").resolve()] = "\n".join([*head, *rest]) + "\n"
    return found


def texts() -> set[str]:
    """Every text that the pages have, in English."""
    seen = set()

    def note(text: str) -> str:
        seen.add(text)
        return text

    for make in (_configuration, _spelling):
        list(make(note))
    return seen


def _configuration(say: Translate) -> Iterator[str]:
    """Every setting, as the dataclasses have it."""
    yield say("Configuration")
    for paragraph in ABOUT_SETTINGS:
        yield from ("", say(paragraph))
    for cls in (EngineConfig, ChatConfig, ServerConfig, SamplingParams):
        yield from ("", f"## {cls.__name__}", "", say((cls.__doc__ or "").splitlines()[0]), "")
        yield f"| {say('setting')} | {say('default')} | {say('allowed')} | {say('meaning')} |"
        yield "|---|---|---|---|"
        for f in fields(cls):
            meta = f.metadata
            default = f.default if f.default_factory is MISSING else f.default_factory()
            low, high = meta["low"], meta["high"]
            allowed = ", ".join(map(str, meta["choices"] or ()))
            if low is not None:
                allowed = f"{say('from')} {low}"
                allowed += "" if high is None else f" {say('to')} {high}"
            shown = "" if default in (None, "", (), {}) else default
            yield f"| `{f.name}` | {shown} | {allowed} | {say(meta['help'])} |"


def _spelling(say: Translate) -> Iterator[str]:
    """LMDeploy's spellings, as the tables have them."""
    yield say("LMDeploy's spellings")
    for paragraph in ABOUT_SPELLINGS:
        yield from ("", say(paragraph))
    shown = {command: " ".join(command) for command in (*MODULES.values(), *PLACES, *FLAGS)}
    modules = {f"-m {name}" if name[0] == "l" else name: shown[to] for name, to in MODULES.items()}
    modules |= {" ".join(name): to for name, to in COMMANDS.items()}
    modules |= {" ".join((*name, "MODEL")).strip(): " ".join((*name, to, "MODEL"))
                for name, to in DEFAULTS.items()}  # fmt: skip
    yield from _table(say, "Commands", "written", "runs", modules)
    places = {f"`{shown[command]}`": say(", then ").join(
                  say(" or ").join(f"`{f}`" for f in flags) for flags in table)
              for command, table in PLACES.items()}  # fmt: skip
    yield from _table(say, "Places, by flags", "command", "flags", places)
    names = {f"{old} ({shown[command] or say('every command')})": new
             for command, table in FLAGS.items() for old, new in table.items()}  # fmt: skip
    names |= {f"{flag} {old}": f"{name} {new}"
              for flag, (name, table) in VALUES.items() for old, new in table.items()}  # fmt: skip
    yield from _table(say, "Flags", "written", "means", names)
    left_out = {flag: say(why) for flag, why in LEFT_OUT.items()}
    yield from _table(say, "Left out, with a notice", "flag", "because", left_out)
    refused = {flag: say(answer) for flag, answer in REFUSED.items()}
    yield from _table(say, "Refused", "flag", "answer", refused)


def _table(
    say: Translate, title: str, left: str, right: str, rows: Mapping[str, str]
) -> Iterator[str]:
    yield from ("", f"## {say(title)}", "", f"| {say(left)} | {say(right)} |", "|---|---|")
    code = {"written", "flag", "runs", "means"}  # columns of what one types
    for row in rows.items():
        a, b = (f"`{text}`" if head in code else text for head, text in zip((left, right), row))
        yield f"| {a} | {b} |"


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
