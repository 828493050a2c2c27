"""LMDeploy's three generations of spelling mean what the fourth, ours, says."""

from __future__ import annotations

import pytest

import app
from backend import command_spelling as spelling
from backend.command_line import flags, subcommands
from backend.errors import UserError


def parsed(line: str) -> dict[str, object]:
    return vars(app.parse(line.split()))


SAME = [
    ("-m lmdeploy.turbomind.chat ./workspace", "chat turbomind ./workspace"),
    ("-m lmdeploy.serve.turbomind ./w --server_name a ----server_port 7",
     "serve gradio ./w --server-name a --server-port 7"),
    ("-m lmdeploy.serve.turbomind.deploy --model-name n --model-path p --group-size 128",
     "convert n p --group-size 128"),
    ("deploy n p", "convert n p"),
    ("lmdeploy chat turbomind ./workspace", "chat turbomind ./workspace"),
    ("lmdeploy --tp 2", "run lmdeploy --tp 2"),  # a folder of that name
    ("benchmark/profile_generation.py w --concurrency 1 --input_seqlen 2 --output_seqlen 3",
     "benchmark profile_generation w --concurrency 1 --prompt-tokens 2 --completion-tokens 3"),
    ("m", "run m"),
    ("--server_port 7", "run --server-port 7"),
    ("chat m --tp 2", "chat turbomind m --tp 2"),
    ("chat", "chat turbomind"),
    ("chat torch --model m", "chat torch m"),
    ("check-env", "check_env"),
    ("doctor --dump_file f", "check_env --dump-file f"),
    ("lite auto-awq --model=m --w_bits 4", "lite auto_awq m --w-bits 4"),
    ("lite kv_qparams --turbomind_dir t --work_dir w --kv_sym False",
     "lite kv_qparams w t --kv-sym false"),
    ("lite kv_qparams w --turbomind_dir t --num_tp 2", "lite kv_qparams w t --num-tp 2"),
    ("lite kv_qparams t --work_dir w", "lite kv_qparams w t"),
    ("serve api_server m --instance_num 64 --backend pytorch",
     "serve api_server m --max-batch-size 64 --kernels reference"),
    ("serve api_client --restful_api_url http://h:1", "serve api_client http://h:1"),
]


@pytest.mark.parametrize(("theirs", "ours"), SAME, ids=[theirs for theirs, _ in SAME])
def test_the_same_by_other_words(theirs: str, ours: str) -> None:
    assert parsed(theirs) == parsed(ours)


def test_the_values_of_a_flag_stay_as_they_are() -> None:
    args = app.parse(["chat", "m", "--system", "with_under_score --and-dashes"])
    assert args.system == "with_under_score --and-dashes"


def test_a_flag_without_a_use_is_left_out_and_that_is_said(capsys) -> None:
    for line in ("chat m --trust-remote-code", "chat m --trust_remote_code True --tp 2"):
        assert "trust_remote_code" not in parsed(line)
        assert "--trust-remote-code is left out: code that comes" in capsys.readouterr().err


@pytest.mark.parametrize("flag", spelling.REFUSED)
def test_what_is_not_here_is_refused_with_what_to_do(flag: str) -> None:
    with pytest.raises(UserError, match=f"^{flag} is not supported. "):
        app.parse(["serve", "api_server", "m", flag, "x"])


@pytest.mark.parametrize(("line", "answer"), [
    ("conver n p", "There is no command and no folder conver. Did you mean convert?"),
    ("chat turbomnd", "Did you mean turbomind?"),
    ("-m lmdeploy.vl.chat x", "There is no command for the module 'lmdeploy.vl.chat'."),
    ("convert n --model-path", "--model-path needs a value."),
    ("convert n p --model-path q", "unrecognized arguments: q."),
    ("chat m --kernels fast", "invalid choice: 'fast'"),
])
def test_mistakes(line: str, answer: str) -> None:
    with pytest.raises(UserError) as said:
        app.parse(line.split())
    assert answer in str(said.value)


def test_the_tables_name_commands_and_flags_that_there_are() -> None:
    parser = app.make_parser()

    def find(command: spelling.Command):
        found = parser
        for name in command:
            found = subcommands(found)[name]
        return found

    for command in spelling.MODULES.values():
        assert not subcommands(find(command)), command
    for command, places in spelling.PLACES.items():
        positionals = [a for a in find(command)._actions if not a.option_strings]
        assert len(positionals) == len(places)
        assert not {flag for flags_ in places for flag in flags_} & set(flags(find(command)))
    for command, table in spelling.FLAGS.items():
        commands = [find(command)] if command else []
        known = {flag for group in commands for sub in subcommands(group).values()
                 for flag in flags(sub)} or set(flags(find(("serve", "api_server"))))
        assert set(table.values()) <= known
        assert not set(table) & known
    for flag, (name, _) in spelling.VALUES.items():
        known = set(flags(find(("serve", "api_server"))))
        assert name in known and flag not in known


def test_the_page_may_insist_on_a_server_or_a_model(capsys) -> None:
    for line in ("serve gradio ./w --restful_api True",
                 "serve gradio http://127.0.0.1:1 --restful_api False"):
        assert app.main(line.split()) == 2
        assert "--restful-api" in capsys.readouterr().err


def test_a_client_is_for_a_server(capsys) -> None:
    assert app.main(["serve", "api_client", "./workspace"]) == 2
    assert "no server's address" in capsys.readouterr().err
    assert app.main(["serve", "api_client", "23333"]) == 2
    assert "Write http://127.0.0.1:23333" in capsys.readouterr().err


def test_help_is_not_what_an_unknown_flag_was_meant_to_be(capsys) -> None:
    assert app.main(["list", "--model", "x"]) == 2
    assert "See: python app.py list --help" in capsys.readouterr().err
