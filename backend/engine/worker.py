"""Main of an engine process. Rank 0 schedules and speaks to the web process; further tensor
parallel ranks load their part of the model and compute what rank 0 sends them.

    python -m backend.engine.worker FD      FD: this end of the pipe, inherited

A process ends when its pipe closes, so none outlives who started it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection

from backend.config import EngineConfig
from backend.engine import messages
from backend.engine.engine import Engine
from backend.engine.types import StepOutput
from backend.errors import UserError


def serve(
    connection: Connection, start: messages.Start, build: Callable[[EngineConfig], Engine]
) -> None:
    """Build the engine that `start` asks for, and run it until the pipe closes."""
    try:
        engine = build(start.config)
    except UserError as error:
        _send_failure(connection, start.epoch, error)
        return
    ready = messages.Ready(start.epoch, engine.runner.info, engine.stats())
    connection.send_bytes(messages.encode(ready))
    try:
        while (refused := _obey(engine, connection)) is not None:
            outputs = refused + engine.step()
            event = messages.Outputs(start.epoch, outputs, engine.stats())
            connection.send_bytes(messages.encode(event))
    finally:
        engine.runner.close()


def _send_failure(connection: Connection, epoch: int, error: UserError) -> None:
    connection.send_bytes(messages.encode(messages.LoadFailed(epoch, error.message, error.hint)))


def _obey(engine: Engine, connection: Connection) -> list[StepOutput] | None:
    """Take all commands that are there, waiting for one if there is nothing to do.

    Returns the last words to requests that cannot run, or None to shut down.
    """
    refused: list[StepOutput] = []
    news = False  # to tell of: an abort changes the gauges even if nothing is left to do
    while connection.poll() or not (engine.has_work() or news):
        command = messages.decode_command(connection.recv_bytes())
        news = True
        if isinstance(command, messages.AddRequest):
            try:
                engine.add_request(command.request)
            except ValueError as error:
                request_id = command.request.request_id
                refused.append(StepOutput(request_id, [], "error", error=str(error)))
        elif isinstance(command, messages.AbortRequest):
            engine.abort_request(command.request_id)
        else:
            return None
    return refused


def build_engine(
    config: EngineConfig, on_rank_death: Callable[[UserError | None], None] | None = None
) -> Engine:
    """The real thing: load the model (and start its further ranks) as `config` says.

    `on_rank_death` as in `start_ranks`.
    """
    from backend.engine.model_runner import ModelRunner, long_context
    from backend.engine.ranks import join_group, start_ranks
    from backend.layers.parallel import ParallelContext
    from backend.models.loader import check_model

    if config.tp > 1:  # told once, before every rank finds it out for itself
        parallel = ParallelContext(0, config.tp)
        check_model(config.model, parallel, config.session_len, long_context(config))
    group = start_ranks(config, on_rank_death)
    runner = ModelRunner(config, join_group(config, 0, group.rendezvous), group.connections)
    return Engine(
        runner,
        enable_prefix_caching=config.enable_prefix_caching,
        max_step_tokens=config.max_prefill_token_num,
    )


def compute(connection: Connection, start: messages.StartRank) -> None:
    """A further rank: forward passes as rank 0 sends them."""
    from backend.engine.model_runner import ModelRunner
    from backend.engine.ranks import join_group

    try:
        runner = ModelRunner(start.config, join_group(start.config, start.rank, start.rendezvous))
    except UserError as error:
        _send_failure(connection, 0, error)
        # Were we gone before that is read, rank 0 would fail in a collective and not know why.
        connection.poll(5.0)
        return
    while True:
        runner.compute(messages.decode_step_input(connection.recv_bytes()))


def main(argv: list[str], build: Callable[[EngineConfig], Engine] | None = None) -> int:
    """Serve the pipe named by `argv`; `build` lets tests bring an engine over a fake model."""
    for number in (signal.SIGINT, signal.SIGTERM):  # are for whoever started us, and ends us
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    fd = int(argv[0])
    os.set_inheritable(fd, False)
    connection = Connection(fd)
    try:
        start = messages.decode_command(connection.recv_bytes())
        if isinstance(start, messages.StartRank):
            compute(connection, start)
        else:
            assert isinstance(start, messages.Start)
            die = partial(_die_with_rank, connection, start.epoch)
            serve(connection, start, build or partial(build_engine, on_rank_death=die))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # who started us is gone
    return 0


def _die_with_rank(connection: Connection, epoch: int, error: UserError | None) -> None:
    """A rank that is gone leaves its peers waiting in a collective: die, to be restarted; or, if
    it could not load the model, not to be."""
    if error is not None:
        with suppress(OSError):  # who started us is gone
            _send_failure(connection, epoch, error)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
