"""`python app.py download ID`, and ids in place of folders wherever a model is named.

What downloads is imported when it does: other commands need neither it nor what it needs.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.errors import UserError
from backend.hub.errors import OfflineError
from backend.hub.names import ENDPOINTS, is_id
from backend.job_events import write_event

if TYPE_CHECKING:
    from backend.hub.fetch import Progress
    from backend.hub.plan import Hub, Plan

MAX_TOKEN_BYTES = 4096
EVENT_EVERY_S = 1.0


def add_command(commands: Any) -> None:
    """The parser of `download`."""
    text = "fetch a model from Hugging Face, a mirror or ModelScope"
    sub = commands.add_parser("download", help=text, description=text, allow_abbrev=False)
    sub.set_defaults(run=run)
    sub.add_argument("id", metavar="ID", help="NAMESPACE/NAME, as on the hub's web page")
    text = "default: huggingface; mirror if HF_ENDPOINT is set"
    sub.add_argument("--source", choices=tuple(ENDPOINTS), default="", help=text)
    sub.add_argument("--endpoint", default="", metavar="URL", help="instead of the source's own")
    sub.add_argument("--revision", default="", help="branch, tag or commit")
    sub.add_argument("--token", action=_NoToken, help=argparse.SUPPRESS)
    text = "file with the hub's token (- is standard input), instead of HF_TOKEN's"
    sub.add_argument("--token-file", metavar="FILE", help=text)
    text = "the folder it becomes, instead of one among the downloaded models"
    sub.add_argument("--local-dir", metavar="DIR", help=text)
    text = "files to have instead of safetensors, tokenizer and JSON"
    sub.add_argument("--include", nargs="+", default=(), metavar="PATTERN", help=text)
    sub.add_argument("--exclude", nargs="+", default=(), metavar="PATTERN", help="not to have")
    sub.add_argument("--plan", action="store_true", help="only say what would be fetched")
    text = "text: for people; json: events on standard output, a line each"
    sub.add_argument("--progress", choices=("text", "json"), default="text", help=text)


class _NoToken(argparse.Action):
    """Refuses, without repeating the token."""

    def __call__(self, *args: Any) -> None:
        raise UserError("Tokens are not taken from the command line, where others see them.",
                        "Set HF_TOKEN, or give --token-file.", field="token")


def run(args: argparse.Namespace) -> int:
    """Download a model; the folder is printed last."""
    from backend.hub.fetch import fetch
    from backend.hub.plan import Hub, make_plan

    events = args.progress == "json"
    try:
        hub = Hub(args.source, args.endpoint, read_token(args.token_file))
        plan = make_plan(hub, args.id, revision=args.revision, local_dir=args.local_dir,
                         include=args.include, exclude=args.exclude)
        if events:
            write_event("plan", **as_json(plan))
        else:
            print(describe(plan), file=sys.stderr)
        if args.plan:
            return 0
        folder = fetch(hub, plan, Reports()) if events else fetch_visibly(hub, plan)
    except UserError as error:
        if events:
            write_event("error", message=error.message, hint=error.hint, code=error.code)
        raise
    if events:
        write_event("result", folder=str(folder))
    else:
        print(folder)
    return 0


def fetch_named_models(args: argparse.Namespace) -> None:
    """Put folders in place of the ids that a command line names as models."""
    for name in ("model", "against"):
        if isinstance(value := getattr(args, name, None), str):
            setattr(args, name, model_folder(value))


def model_folder(name: str) -> str:
    """The folder of what the user named: itself, or the downloaded copy of the model of that id,
    which is fetched if it is not there yet. What is no id, such as a URL, stays as it is.

    Raises:
        UserError: it is neither a folder nor on the hub, or cannot be fetched.
    """
    if not is_id(name) or os.path.exists(name):
        return name
    from backend.hub.library import find
    from backend.hub.plan import Hub, make_plan

    if os.path.isdir(name.partition("/")[0]):  # a path mistyped; one does not fetch gigabytes then
        raise UserError(f"There is no folder {name}.",
                        f"If it is a model's id: python app.py download {name}", field="model")
    if found := find(name):
        return str(found.folder)
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise OfflineError(f"There is no folder {name} and no downloaded model of that id.",
                           "HF_HUB_OFFLINE is set, so it is not fetched.")
    hub = Hub()
    plan = make_plan(hub, name)
    print(describe(plan), file=sys.stderr)
    return str(fetch_visibly(hub, plan))


def fetch_visibly(hub: Hub, plan: Plan) -> Path:
    """`fetch` with a bar, if standard error is a terminal. Ctrl-C says how to go on."""
    from tqdm import tqdm

    from backend.hub.fetch import fetch

    there = plan.total_bytes - plan.bytes_to_fetch
    with tqdm(total=plan.total_bytes, initial=there, unit="B", unit_scale=True,
              disable=None if plan.bytes_to_fetch else True) as bar:

        def report(progress: Progress) -> None:
            bar.set_description(progress.file, refresh=False)
            bar.update(progress.done - bar.n)

        try:
            return fetch(hub, plan, report)
        except KeyboardInterrupt:
            bar.close()
            print("Stopped. The same command goes on from here.", file=sys.stderr)
            raise


def describe(plan: Plan) -> str:
    """A plan in words and a table."""
    from backend.hub.fetch import gigabytes

    version = plan.commit[:12] or plan.revision
    lines = [f"{plan.id} at {version} from {plan.endpoint}"]
    for planned in plan.files:
        state = ""
        if planned.verified:
            state = "  there"
        elif planned.partial:
            state = f"  {gigabytes(planned.partial)} there"
        lines.append(f"  {gigabytes(planned.file.size):>10}  {planned.file.path}{state}")
    total = f"{len(plan.files)} files, {gigabytes(plan.total_bytes)}"
    if plan.complete:
        return "\n".join([*lines, f"{total}: all there."])
    lines.append(f"{total}: {gigabytes(plan.bytes_to_fetch)} to fetch into {plan.target}; "
                 f"the disk has {gigabytes(plan.disk_free)} free.")
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    return {
        "id": plan.id, "source": plan.source, "endpoint": plan.endpoint,
        "revision": plan.revision, "commit": plan.commit, "target": str(plan.target),
        "total": plan.total_bytes, "to_fetch": plan.bytes_to_fetch, "left_out": plan.left_out,
        "disk_free": plan.disk_free, "fits": plan.fits, "complete": plan.complete,
        "files": [{"path": p.file.path, "size": p.file.size, "verified": p.verified,
                   "partial": p.partial} for p in plan.files],
    }


def read_token(path: str | None) -> str | None:
    """The token in a file; None without one.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    if path is None:
        return None
    try:
        if path == "-":
            text = sys.stdin.read(MAX_TOKEN_BYTES)
        else:
            with open(os.path.expanduser(path), encoding="utf-8") as file:
                text = file.read(MAX_TOKEN_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"The token file {path} cannot be read: {reason}.") from None
    if not text.strip():
        raise UserError(f"The token file {path} is empty.", field="token")
    return text.strip()


class Reports:
    """Progress as events: one a second, for a download of hours is a file of them.

    Args:
        clock: seconds from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = -math.inf

    def __call__(self, progress: Progress) -> None:
        now = self._clock()
        if now - self._last < EVENT_EVERY_S and progress.done < progress.total:
            return
        self._last = now
        eta = progress.eta_s
        write_event("step", file=progress.file, done=progress.done, total=progress.total,
                    bytes_per_s=round(progress.bytes_per_s),
                    eta_s=None if eta is None else round(eta, 1))
