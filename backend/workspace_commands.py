"""The command lines of workspaces: convert, import, config; what runs them is imported then."""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from backend import config
from backend.config import EngineConfig, parse_bool
from backend.errors import UserError
from backend.workspace.editor import UNDOS
from backend.workspace.layout import verify, workspace_of

if TYPE_CHECKING:
    from backend.workspace.settings import Row

COMMANDS = ("convert", "import", "config")


def add_commands(group: Any) -> None:
    """Add them to argparse's `group` of subparsers."""
    text = "make a workspace of a model"
    sub = _command(group, "convert", text, _convert)
    sub.add_argument("name", metavar="NAME", help="its name; internlm-chat-7b and the like choose "
                     "a chat template")  # fmt: skip
    sub.add_argument("model", metavar="PATH", help="folder of the model, in Hugging Face layout")
    text = "hf (16 bits) or awq (4 bits); default: what the model says"
    sub.add_argument("--model-format", choices=("hf", "awq"), help=text)
    text = "inputs that share a scale, of awq; default: what the model says"
    sub.add_argument("--group-size", type=int, default=0, help=text)
    text = "GPUs to part the weights for (default: 1)"
    sub.add_argument("--tp", type=int, default=1, help=text)
    text = "where the workspace goes (default: workspace)"
    sub.add_argument("--dst-path", metavar="DIR", default="workspace", help=text)
    text = "folder or file of a tokenizer to take instead of the model's"
    sub.add_argument("--tokenizer-path", metavar="PATH", help=text)
    _overwrite(sub)

    text = "make safetensors of a model's .bin files, in a process with limits"
    sub = _command(group, "import", text, _import)
    sub.add_argument("model", metavar="PATH", help="folder with pytorch_model*.bin")
    sub.add_argument("target", metavar="DST", help="where the new model goes")
    _overwrite(sub)

    text = "what a model is run with: config.ini of a workspace, own settings for a plain folder"
    kinds = group.add_parser("config", help=text, description=text).add_subparsers(
        required=True, metavar="show|set|undo|memory|verify"
    )
    text = "every key: its effective value, and where it comes from"
    sub = _command(kinds, "show", text, _show)
    _model(sub)
    config.add_arguments(sub, EngineConfig, positionals=False)
    sub = _command(kinds, "set", "change values; what changes is shown as a diff", _set)
    _model(sub)
    text = "keys and their new values; KEY= takes it out, so that its default counts"
    sub.add_argument("changes", metavar="KEY=VALUE", nargs="+", help=text)
    text = f"take the last change back, up to {UNDOS} of them"
    _model(_command(kinds, "undo", text, _undo))
    text = "what the model will take and hold with these settings, before it is loaded"
    sub = _command(kinds, "memory", text, _memory)
    _model(sub)
    config.add_arguments(sub, EngineConfig, positionals=False)
    sub = _command(kinds, "verify", "compare every file of a workspace with its manifest", _verify)
    sub.add_argument("workspace", metavar="WORKSPACE", help="folder that convert made")


def _command(group: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = group.add_parser(
        name, help=text, description=text, allow_abbrev=False
    )
    sub.set_defaults(run=run)
    return sub


def _model(sub: argparse.ArgumentParser) -> None:
    text = "folder of a model, or of a workspace that convert made"
    sub.add_argument("model", metavar="MODEL", help=text)


def _overwrite(sub: argparse.ArgumentParser) -> None:
    text = "replace what is there, once the new one is complete"
    sub.add_argument("--overwrite", nargs="?", const=True, default=False, type=parse_bool,
                     metavar="true|false", help=text)  # fmt: skip


def _convert(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from backend.workspace.convert import convert

    if not 1 <= args.tp <= 64:
        raise UserError(f"tp must be from 1 to 64, not {args.tp}.", field="tp")
    if os.path.isdir(args.name) and not os.path.exists(args.model):
        raise UserError(f"The model folder {args.model} does not exist.",
                        f"The name comes first: convert {args.model} {shlex.quote(args.name)}",
                        field="model")
    with tqdm(desc="convert", unit="B", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        folder = convert(
            args.name,
            args.model,
            args.dst_path,
            tp=args.tp,
            model_format=args.model_format,
            group_size=args.group_size,
            tokenizer_path=args.tokenizer_path,
            overwrite=args.overwrite,
            progress=progress,
        )
    place = shlex.quote(args.dst_path)
    print(f"{folder}: a workspace for tp {args.tp}. Try it: python app.py chat {place}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from backend.import_bin import import_model

    names = import_model(args.model, args.target, overwrite=args.overwrite)
    print(f"{args.target}: {', '.join(names)}")
    return 0


def _folder(args: argparse.Namespace) -> str:
    folder: str = os.path.expanduser(args.model)
    if not os.path.isdir(folder):
        raise UserError(f"{args.model} is no folder.", "Name a model or a workspace.")
    return folder


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """EngineConfig's fields that flags were given for."""
    names = (f.name for f in fields(EngineConfig) if f.name != "model")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _show(args: argparse.Namespace) -> int:
    from backend.workspace.settings import settings_of, show

    folder = _folder(args)
    print(table(show(folder, _given(args))))
    print(f"File: {settings_of(folder).path}")
    return 0


def table(rows: list[Row]) -> str:
    """`config show`, for people."""
    notes = {
        "model": "fixed: the model's", "weights": "fixed: the weights'",
        "legacy": "without effect", "unknown": "unknown",
    }  # fmt: skip
    cells = [("key", "value", "from", "", "meaning")] + [
        (row.name, row.value, row.source, notes.get(row.kind, ""), row.help) for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells)][:-1]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[-1]])
        for line in cells
    )


def _set(args: argparse.Namespace) -> int:
    from backend.workspace.editor import save
    from backend.workspace.settings import settings_of

    changes = {}
    for word in args.changes:
        key, equals, value = word.partition("=")
        if not (key and equals):
            hint = "Such as: session_len=4096"
            if any(other.startswith("=") for other in args.changes):
                hint = "Write no blanks around the =, such as: session_len=4096"
            elif "=" in args.model and not os.path.exists(args.model):
                hint = f"The model comes first: config set MODEL {args.model}"
            raise UserError(f"{word!r:.80} is no KEY=VALUE.", hint)
        changes[key.strip()] = value.strip()
    file = settings_of(_folder(args))
    saved = save(file, changes)
    print(saved.diff or "Nothing changes.")
    for key in changes:
        if file.keys[key].kind == "legacy":
            print(f"{key} is without effect.")
    print(f"{file.path}: takes effect when the model is loaded next.")
    return 0


def _undo(args: argparse.Namespace) -> int:
    from backend.workspace.editor import undo
    from backend.workspace.settings import settings_of

    print(undo(settings_of(_folder(args))))
    return 0


def _memory(args: argparse.Namespace) -> int:
    from backend.footprint import fit, measure
    from backend.workspace.settings import engine_options

    folder, given = _folder(args), _given(args)
    options = EngineConfig(**{**engine_options(folder, given), **given, "model": folder})
    config.validate(options)
    print(fit(measure(options), options).describe())
    return 0


def _verify(args: argparse.Namespace) -> int:
    root = workspace_of(args.workspace)
    if root is None:
        raise UserError(
            f"{args.workspace} is no workspace.", "Make one with: python app.py convert NAME MODEL"
        )
    count = verify(root, again=True)
    print(f"{root}: all {count} files are as convert wrote them.")
    return 0
