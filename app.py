"""LMDesk's command line: parses, builds the services, runs one command.

python app.py [MODEL]                          page and API on one port; the bundled model
python app.py serve api_server MODEL           the API alone
python app.py serve gradio http://HOST:PORT    the page over a remote api_server
python app.py serve api_client http://HOST:PORT   in the terminal, with an api_server
python app.py serve proxy                      one address for many api_servers
python app.py chat MODEL                       in the terminal
python app.py benchmark profile_generation MODEL   how fast it is; docs/benchmarking.md
python app.py lite auto_awq MODEL              quantize it, and measure how good it is then
python app.py guide measure MODEL              16 bits, int8 KV, 4-bit weights, both: which is best
python app.py convert NAME MODEL               make a workspace; MODEL above may be one
python app.py config show MODEL                what it is run with: every key, and what it does
python app.py download NAMESPACE/NAME          fetch a model; MODEL above may be its id, too
python app.py check_env                        what this machine can run
python app.py list                             the chat formats' names

What LMDeploy's tutorials have after `lmdeploy` or `python3` works here; docs/commands/spelling.md.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from backend import chat_commands, command_line, config
from backend.benchmark.commands import add_commands as add_benchmark_commands
from backend.command_examples import add_examples
from backend.command_line import Parser, add_command
from backend.config import ChatConfig, EngineConfig, ServerConfig, parse_bool
from backend.errors import UserError
from backend.hub_commands import add_command as add_download_command, fetch_named_models
from backend.proxy_command import MembershipConfig, add_command as add_proxy_command
from backend.target import BUNDLED_MODEL, add_service_flags, is_address, open_services
from backend.workspace_commands import add_commands as add_workspace_commands
from quantize.commands import add_commands as add_lite_commands, add_guide_command

if TYPE_CHECKING:
    from backend.services import Services

SERVER = (EngineConfig, ChatConfig, ServerConfig)


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


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, in any spelling of LMDeploy's; without a command it is `run`.

    Raises:
        UserError: an unknown flag, or a value of the wrong kind.
    """
    return command_line.parse(make_parser(), argv)


def make_parser() -> Parser:
    """Every command."""
    parser = Parser(
        "app.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    examples = ("", "./internlm2-chat-1_8b", "./workspace --server-port 7000")
    text = "page and API on one port; without a command it is this one"
    sub = add_command(commands, "run", text, run_page, *SERVER, examples=examples)
    add_service_flags(sub)
    _add_page_flags(sub)
    _add_serve(commands)
    chat_commands.add_commands(commands)
    names = "profile_generation|profile_throughput|profile_restful_api"
    text = "how fast a model or a server is"
    benchmark = commands.add_parser("benchmark", help=text, description=text)
    add_benchmark_commands(benchmark.add_subparsers(required=True, metavar=names))
    text = "quantize a model, or measure how good one is"
    lite = commands.add_parser("lite", help=text, description=text)
    names = "calibrate|auto_awq|smooth_quant|kv_qparams|evaluate"
    add_lite_commands(lite.add_subparsers(required=True, metavar=names))
    add_guide_command(commands)
    add_workspace_commands(commands)
    add_download_command(commands)
    add_examples(parser)
    return parser


def _add_page_flags(parser) -> None:
    text = "start without a model; the page loads one"
    parser.add_argument("--no-model", action="store_true", help=text)


def _add_serve(commands) -> None:
    text = "a server: the API, the page; or a client of one"
    serve = commands.add_parser("serve", help=text, description=text)
    kinds = serve.add_subparsers(required=True, metavar="api_server|gradio|api_client|proxy")
    text = "the OpenAI-compatible API"
    examples = ("serve api_server ./workspace --server-port 23333",
                "serve api_server ./internlm2-chat-7b --server-name 0.0.0.0 --tp 2")
    settings = (*SERVER, MembershipConfig)
    sub = add_command(kinds, "api_server", text, run_api_server, *settings, examples=examples)
    add_service_flags(sub)
    text = "the page, over the api_server at a URL or with a model of its own"
    examples = ("serve gradio ./workspace",
                "serve gradio http://127.0.0.1:23333 --server-port 6006")
    sub = add_command(kinds, "gradio", text, run_gradio, *SERVER, examples=examples)
    add_service_flags(sub)
    _add_page_flags(sub)
    text = "true insists that the target is a server's URL, false that it is a model"
    sub.add_argument("--restful-api", type=parse_bool, metavar="true|false", help=text)
    chat_commands.add_api_client(kinds)
    add_proxy_command(kinds)


async def run_gradio(args: argparse.Namespace) -> int:
    """The page, over what the user says that the target is."""
    if args.restful_api is not None and args.restful_api != is_address(getattr(args, "model", "")):
        raise UserError(
            f"--restful-api {str(args.restful_api).lower()} does not fit the target.",
            "Name a server as http://HOST:PORT, or a model's folder.",
            field="restful_api",
        )
    return await run_page(args)


async def run_page(args: argparse.Namespace) -> int:
    """The page; over an engine of our own the API is beside it."""
    server = config.from_namespace(ServerConfig, args)
    services = open_services(args, next(iter(server.api_keys), ""))
    if services.remote:
        server = replace(server, api_keys=())  # those were for the remote server
    else:
        from backend.services import add_desk

        add_desk(services, BUNDLED_MODEL, server.model_dirs)
    return await serve(services, server, hasattr(args, "server_port"), with_page=True)


async def run_api_server(args: argparse.Namespace) -> int:
    """The API alone."""
    server = config.from_namespace(ServerConfig, args, server_port=23333)
    join = config.from_namespace(MembershipConfig, args)
    services = open_services(args)
    if services.remote:
        raise UserError(f"{args.model} is a server already.", "Name a model's folder.")
    return await serve(services, server, fixed_port=True, with_page=False, join=join)


async def serve(
    services: Services, server: ServerConfig, fixed_port: bool, with_page: bool,
    join: MembershipConfig | None = None,
) -> int:
    """Listen, say where, and serve until told to stop."""
    from backend.class_file import open_class
    from backend.server.api import base_app, create_app
    from backend.server.auth import resolve_keys
    from backend.server.listen import bind, invitation, serve_forever

    if server.host_keys:
        services.classroom = open_class(server.server_port)
    sock, server = bind(server, fixed_port)
    server = resolve_keys(server)
    membership = None
    if join is not None and join.proxy_url:
        from backend.server.proxy.membership import Membership

        membership = Membership(join.proxy_url, join.proxy_key, server)
        await membership.check()
    async with services:  # the engine loads its model while the page is being built
        if services.engines is None:
            app = base_app(services.chat, server, services.classroom, lambda: "")
        else:
            app = create_app(
                services.engines, server, services.classroom, docs_at_root=not with_page)
        if with_page:
            from backend.history import open_history
            from ui.build import mount_page

            services.history, services.invitation = open_history(), invitation(server)
            app = mount_page(app, services, server.root_path)
        await serve_forever(app, sock, server, services, with_page, membership)
    return 0


if __name__ == "__main__":
    sys.exit(main())
