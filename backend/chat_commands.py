"""The command lines of the terminal: chat, serve api_client, check_env, list."""

from __future__ import annotations

import argparse
import os
from typing import Any

from backend import config
from backend.command_line import add_command
from backend.config import ChatConfig, EngineConfig, SamplingParams
from backend.errors import UserError
from backend.target import add_service_flags, is_address, open_services

KEYS = "double Enter sends, Ctrl-C stops a reply, end begins anew, exit leaves"


def add_commands(group: Any) -> None:
    """Add chat, check_env and list to argparse's `group` of subparsers."""
    text = f"chat in the terminal: {KEYS}"
    kinds = group.add_parser("chat", help="chat in the terminal", description=text)
    kinds = kinds.add_subparsers(required=True, metavar="turbomind|torch")
    settings = (EngineConfig, ChatConfig, SamplingParams)
    examples: tuple[str, ...] = (
        "chat", "chat turbomind ./workspace", "chat turbomind Qwen/Qwen2.5-0.5B-Instruct",
        "chat turbomind ./internlm2-chat-7b --model-name internlm2-chat-7b --tp 2",
    )  # fmt: skip
    sub = add_command(kinds, "turbomind", text, run_chat, *settings, examples=examples)
    add_service_flags(sub)
    _conversation(sub)
    text = f"the same on plain torch operations, slow and obvious: {KEYS}"
    examples = ("chat torch ./internlm-chat-7b-w8",)
    sub = add_command(kinds, "torch", text, run_chat, *settings, examples=examples)
    add_service_flags(sub)
    _conversation(sub)
    sub.set_defaults(kernels="reference")

    text = "what this machine can run, in plain words"
    sub = add_command(group, "check_env", text, run_check_env, examples=("check_env",))
    text = "write it to this file instead, to send it to somebody"
    sub.add_argument("--dump-file", metavar="FILE", help=text)
    text = "the chat formats that --model-name and --chat-template take by name"
    add_command(group, "list", text, list_formats)


def add_api_client(kinds: Any) -> None:
    """Add api_client to argparse's subparsers of `serve`."""
    text = f"chat in the terminal with a running api_server: {KEYS}"
    examples = ("serve api_client http://127.0.0.1:23333",
                "serve api_client http://127.0.0.1:23333 --session-id 1")
    sub = add_command(kinds, "api_client", text, run_api_client, SamplingParams, examples=examples)
    sub.add_argument("model", metavar="URL", help="of the server, such as http://127.0.0.1:23333")
    text = ("have the server keep the conversation under this number, so that other clients with "
            "the same key can go on with it; default: it is kept here")
    sub.add_argument("--session-id", type=int, metavar="N", help=text)
    _conversation(sub)


def _conversation(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--system", help="system prompt of the conversation")
    text = "key of the api_server; a server of ours on this machine needs none"
    sub.add_argument("--api-key", default="", help=text)


async def run_chat(args: argparse.Namespace) -> int:
    """Chat in the terminal, until the user leaves."""
    from backend.console import chat
    from backend.conversation import Conversation, OwnConversation
    from backend.remote import RemoteChat
    from backend.remote_session import RemoteSession

    services = open_services(args, args.api_key)
    defaults = {"max_tokens": 512, **services.sampling_defaults}
    sampling = config.from_namespace(SamplingParams, args, **defaults)
    async with services:
        await services.ready()
        await services.chat.models()  # a dead server is told now, not after the first message
        number = getattr(args, "session_id", None)
        conversation: Conversation = OwnConversation(services.chat, args.system)
        if number is not None and isinstance(services.chat, RemoteChat):
            conversation = RemoteSession(services.chat, number, args.system)
        await chat(conversation, sampling)
    return 0


async def run_api_client(args: argparse.Namespace) -> int:
    """Chat with a server, in the terminal."""
    if args.model.isdecimal() and not os.path.exists(args.model):
        raise UserError(f"{args.model} is a port, not an address.",
                        f"Write http://127.0.0.1:{args.model}")
    if not is_address(args.model):
        raise UserError(
            f"{args.model} is no server's address.",
            f"Write it like http://127.0.0.1:23333; a model by itself: python app.py chat "
            f"{args.model}",
        )
    return await run_chat(args)


def run_check_env(args: argparse.Namespace) -> int:
    """Say what this machine can run."""
    from backend.doctor import report

    text = report()
    if args.dump_file is None:
        print(text, end="")
        return 0
    try:
        with open(args.dump_file, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{args.dump_file} cannot be written: {error.strerror}.") from error
    return 0


def list_formats(args: argparse.Namespace) -> int:
    """Print the names of the chat formats, one a line."""
    from backend.chat_formats import names

    print("\n".join(names()))
    return 0
