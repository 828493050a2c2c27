"""What a command line names as its target: a model to load, or the address of a server."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from backend import config
from backend.command_line import LOG_LEVELS
from backend.config import ChatConfig, EngineConfig
from backend.errors import UserError

if TYPE_CHECKING:
    from backend.services import Services

BUNDLED_MODEL = Path(__file__).resolve().parents[1] / "assets" / "demo_model"


def add_service_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of commands that load a model, beside those of their settings."""
    text = "run the engine in this process instead of a child"
    parser.add_argument("--inline", action="store_true", help=text)
    text = "refuse the model if its weights are not of this kind; its files tell what they are"
    parser.add_argument("--model-format", choices=("hf", "awq"), help=text)
    text = "the same for the inputs that share a scale, of awq"
    parser.add_argument("--group-size", type=int, default=0, help=text)
    text = "what to write of this process's log (default: WARNING)"
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="WARNING", help=text)


def open_services(args: argparse.Namespace, api_key: str = "") -> Services:
    """Services for the positional target: a URL (or host:port that is no folder), or a model.

    Raises:
        UserError: a flag does not fit the target, or there is no such model.
    """
    from backend.services import local_services, remote_services

    if hasattr(args, "log_level"):
        logging.getLogger().setLevel(args.log_level)
    for flag in ("api_keys", "host_keys"):  # they take all words up to the next flag
        for key in getattr(args, flag, ()):
            if os.path.isdir(key) or "://" in key:
                spelled = "--" + flag.replace("_", "-")
                raise UserError(f"{key} was read as an API key.",
                                f"Name the model before {spelled}.", field=flag)
    target = os.path.expanduser(getattr(args, "model", str(BUNDLED_MODEL)))
    if is_address(target):
        _refuse_flags_of_models(args, target)
        return remote_services(target, api_key)
    from backend.engine.inline import ThreadHandle
    from backend.engine.launcher import ProcessHandle
    from backend.engine_manager import LoadRequest

    if args.model_format is not None or args.group_size:
        from backend.models.registry import read_model_config
        from backend.workspace.convert import check_format

        quantization = read_model_config(os.path.abspath(target)).quantization
        check_format(target, quantization, args.model_format, args.group_size)
    given = {f.name: getattr(args, f.name) for f in fields(EngineConfig) if hasattr(args, f.name)}
    given.pop("model", None)
    request = LoadRequest(target, given, config.from_namespace(ChatConfig, args))
    launch = ThreadHandle if args.inline else ProcessHandle
    return local_services(request, launch, load=not getattr(args, "no_model", False))


def is_address(target: str) -> bool:
    """Whether a target is a server's address, not a folder or a model's id."""
    host, _, port = target.rpartition(":")  # a number alone is the name of a folder
    return "://" in target or bool(host) and port.isdigit() and not os.path.exists(target)


def _refuse_flags_of_models(args: argparse.Namespace, target: str) -> None:
    names = [f.name for cls in (EngineConfig, ChatConfig) for f in fields(cls)]
    given = [name for name in names if name != "model" and hasattr(args, name)]
    given += [name for name in ("model_format", "group_size") if getattr(args, name, None)]
    if given:
        raise UserError(
            f"--{given[0].replace('_', '-')} is for a model, not for the server {target}.",
            "Give it to the command that serves the model.",
        )
