"""LMDesk's command line: parses, builds the services, runs one command.

python app.py [MODEL]                          page and API on one port; the bundled model
python app.py serve api_server MODEL           the API alone
python app.py serve gradio http://HOST:PORT    the page over a remote api_server
python app.py chat MODEL                       in the terminal
python app.py benchmark profile_generation MODEL   how fast it is; docs/benchmarking.md
python app.py lite auto_awq MODEL              quantize it, and measure how good it is then
python app.py convert NAME MODEL               make a workspace; MODEL above may be one
python app.py config show MODEL                what it is run with: every key, and what it does
python app.py download NAMESPACE/NAME          fetch a model; MODEL above may be its id, too
python app.py list                             the chat formats' names
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import logging
import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from backend import config
from backend.benchmark.commands import add_commands
from backend.chat_formats import template_choice
from backend.config import ChatConfig, EngineConfig, SamplingParams, ServerConfig
from backend.errors import UserError
from backend.hub_commands import add_command as add_download_command, fetch_named_models
from backend.workspace.settings import engine_options, model_name
from backend.workspace_commands import (
    COMMANDS as WORKSPACE_COMMANDS,
    add_commands as add_workspace_commands,
)
from quantize.commands import add_commands as add_lite_commands

if TYPE_CHECKING:
    from backend.services import Services

COMMANDS = (
    "run", "serve", "chat", "benchmark", "lite", "download", "list", *WORKSPACE_COMMANDS, "-h",
    "--help",
)  # fmt: skip
SERVER = (EngineConfig, ChatConfig, ServerConfig)
BUNDLED_MODEL = Path(__file__).resolve().parent / "assets" / "demo_model"


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 2 for bad input, as argparse does."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        fetch_named_models(args)
        outcome = args.run(args)
        return asyncio.run(outcome) if asyncio.iscoroutine(outcome) else outcome
    except UserError as error:
        print(f"lmdesk: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


class Parser(argparse.ArgumentParser):
    """Tells mistakes as all others are told: one sentence, not after a screen of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.", f"See: python {self.prog} --help")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Without a command it is `run`; `--server_name` is `--server-name`.

    Raises:
        UserError: an unknown flag, or a value of the wrong kind.
    """
    if not argv or argv[0] not in COMMANDS:
        argv = ["run", *argv]
    flags = [word.partition("=") for word in argv]
    argv = [
        (flag.replace("_", "-") if flag.startswith("--") else flag) + equals + value
        for flag, equals, value in flags
    ]
    parser = Parser(
        "app.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _command(commands, "run", "page and API on one port", run_page, *SERVER)
    serve = commands.add_parser("serve", help="a server: api_server or gradio")
    kinds = serve.add_subparsers(required=True, metavar="api_server|gradio")
    text = "the OpenAI-compatible API"
    _command(kinds, "api_server", text, run_api_server, *SERVER)
    text = "the page, over the api_server at a URL or with a model of its own"
    _command(kinds, "gradio", text, run_page, *SERVER)
    settings = (EngineConfig, ChatConfig, SamplingParams)
    chat = _command(commands, "chat", "in the terminal", run_chat, *settings)
    chat.add_argument("--system", help="system prompt")
    chat.add_argument("--api-key", default="", help="key of the api_server, if MODEL is a URL")
    names = "profile_generation|profile_throughput|profile_restful_api"
    benchmark = commands.add_parser("benchmark", help="how fast a model or a server is")
    add_commands(benchmark.add_subparsers(required=True, metavar=names))
    lite = commands.add_parser("lite", help="quantize a model, or measure how good one is")
    names = "calibrate|auto_awq|smooth_quant|kv_qparams|evaluate"
    add_lite_commands(lite.add_subparsers(required=True, metavar=names))
    add_workspace_commands(commands)
    add_download_command(commands)
    text = "the chat formats that --model-name and --chat-template take by name"
    commands.add_parser("list", help=text, description=text).set_defaults(run=list_formats)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        message = f"unrecognized arguments: {' '.join(unknown)}."
        raise UserError(message, _hint(unknown, parser, argv))
    return args


def _hint(unknown: list[str], parser: argparse.ArgumentParser, argv: list[str]) -> str:
    """The flag of the chosen command that was perhaps meant, else where its flags are told."""
    for word in argv:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and word in action.choices:
                parser = action.choices[word]
    flags = [flag for action in parser._actions for flag in action.option_strings]
    near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1)
    return f"Did you mean {near[0]}?" if near else f"See: python {parser.prog} --help"


def _command(group, name: str, help: str, run, *settings: type) -> argparse.ArgumentParser:
    sub = group.add_parser(name, help=help, description=help, allow_abbrev=False)
    sub.set_defaults(run=run)
    for cls in settings:
        config.add_arguments(sub, cls)
    text = "run the engine in this process instead of a child"
    sub.add_argument("--inline", action="store_true", help=text)
    return sub


def open_services(args: argparse.Namespace, api_key: str = "") -> Services:
    """Services for the positional target: a URL (or host:port that is no folder), or a model."""
    from backend.engine.inline import ThreadHandle
    from backend.engine.launcher import ProcessHandle
    from backend.services import local_services, remote_services

    for key in getattr(args, "api_keys", ()):
        if os.path.isdir(key) or "://" in key:  # --api-keys takes all words up to the next flag
            raise UserError(f"{key} was read as an API key.", "Name the model before --api-keys.")
    target = os.path.expanduser(getattr(args, "model", str(BUNDLED_MODEL)))
    host, _, port = target.rpartition(":")  # a number alone is the name of a folder
    is_address = bool(host) and port.isdigit() and not os.path.exists(target)
    if "://" in target or is_address:
        for name in (f.name for cls in (EngineConfig, ChatConfig) for f in fields(cls)):
            if name != "model" and hasattr(args, name):
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"{flag} is for a model, not for the server {target}.",
                    "Give it to the command that serves the model.",
                )
        return remote_services(target, api_key)
    options = engine_options(target, vars(args))
    # The engine's process has another working directory.
    engine = config.from_namespace(EngineConfig, args, **options)
    engine = replace(engine, model=os.path.abspath(target))
    named = config.from_namespace(ChatConfig, args)
    name = named.model_name or model_name(target)
    template = template_choice(named.chat_template, name)
    launch = ThreadHandle if args.inline else ProcessHandle
    return local_services(engine, name or os.path.basename(engine.model), launch, template)


def list_formats(args: argparse.Namespace) -> int:
    """Print the names of the chat formats, one a line."""
    from backend.chat_formats import names

    print("\n".join(names()))
    return 0


async def run_page(args: argparse.Namespace) -> int:
    """The page; over an engine of our own the API is beside it."""
    server = config.from_namespace(ServerConfig, args)
    services = open_services(args, next(iter(server.api_keys), ""))
    if services.remote:
        server = replace(server, api_keys=())  # those were for the remote server
    return await serve(services, server, hasattr(args, "server_port"), with_page=True)


async def run_api_server(args: argparse.Namespace) -> int:
    """The API alone."""
    server = config.from_namespace(ServerConfig, args, server_port=23333)
    services = open_services(args)
    if services.remote:
        raise UserError(f"{args.model} is a server already.", "Name a model's folder.")
    return await serve(services, server, fixed_port=True, with_page=False)


async def run_chat(args: argparse.Namespace) -> int:
    """Chat in the terminal, until the user leaves."""
    from backend.console import chat

    services = open_services(args, args.api_key)
    defaults = {"max_tokens": 512, **services.sampling_defaults}
    sampling = config.from_namespace(SamplingParams, args, **defaults)
    async with services:
        await services.ready()
        await services.chat.models()  # a dead server is told now, not after the first message
        await chat(services.chat, sampling, system=args.system)
    return 0


async def serve(services: Services, server: ServerConfig, fixed_port: bool, with_page: bool) -> int:
    """Listen, say where, and serve until told to stop."""
    from backend.server.api import base_app, create_app
    from backend.server.auth import resolve_keys
    from backend.server.listen import bind, serve_forever

    sock, server = bind(server, fixed_port)
    server = resolve_keys(server)
    async with services:  # the engine loads its model while the page is being built
        if services.local is None:
            app = base_app(services.chat, server, lambda: "")
        else:
            app = create_app(
                services.local,
                server,
                sampling_defaults=services.sampling_defaults,
                docs_at_root=not with_page,
            )
        if with_page:
            from ui.build import mount_page

            app = mount_page(app, services, server.root_path)
        await serve_forever(app, sock, server, services, with_page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
