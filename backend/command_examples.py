"""Command lines that the help of a command shows, for those whose parsers bring none."""

from __future__ import annotations

import argparse

from backend.command_line import epilog, subcommands
from backend.command_spelling import Command

EXAMPLES: dict[Command, tuple[str, ...]] = {
    ("list",): ("list",),
    ("benchmark", "profile_generation"): (
        "benchmark profile_generation ./workspace --concurrency 1 16 --prompt-tokens 1 128 "
        "--completion-tokens 128 512",
        "benchmark profile_generation --random-weights llama-2-7b --quantization awq",
    ),
    ("benchmark", "profile_throughput"): (
        "benchmark profile_throughput ./internlm2-chat-7b --num-prompts 200",
        "benchmark profile_throughput ./workspace --dataset ShareGPT.json",
    ),
    ("benchmark", "profile_restful_api"): (
        "benchmark profile_restful_api http://127.0.0.1:23333",
    ),
    ("lite", "calibrate"): (
        "lite calibrate ./internlm-chat-7b --work-dir ./quant_output",
        "lite calibrate ./internlm-chat-7b --calib-dataset my_texts.txt --calib-samples 64",
    ),
    ("lite", "auto_awq"): (
        "lite auto_awq ./internlm-chat-7b --work-dir ./internlm-chat-7b-4bit",
        "lite auto_awq ./internlm-chat-7b --w-bits 4 --w-group-size 128 --calib-samples 64",
    ),
    ("lite", "smooth_quant"): (
        "lite smooth_quant ./internlm-chat-7b --work-dir ./internlm-chat-7b-w8",
    ),
    ("lite", "kv_qparams"): (
        "lite kv_qparams ./quant_output ./workspace/triton_models/weights --num-tp 1",
    ),
    ("lite", "evaluate"): ("lite evaluate ./internlm-chat-7b-4bit",),
    ("guide", "measure"): ("guide measure ./internlm2-chat-7b",),
    ("guide", "show"): ("guide show ./internlm2-chat-7b",),
    ("convert",): (
        "convert internlm2-chat-7b ./internlm2-chat-7b",
        "convert llama2 ./llama2-chat-7b-w4 --model-format awq --group-size 128 --dst-path ./w4",
        "convert internlm2-chat-7b ./internlm2-chat-7b --tp 2 --overwrite",
    ),
    ("import",): ("import ./internlm-chat-7b ./internlm-chat-7b-safetensors",),
    ("config", "show"): ("config show ./workspace", "config show ./workspace --session-len 4096"),
    ("config", "set"): (
        "config set ./workspace quant_policy=4 session_len=4096",
        "config set ./workspace session_len=",
    ),
    ("config", "undo"): ("config undo ./workspace",),
    ("config", "memory"): ("config memory ./workspace --quant-policy 8",),
    ("config", "verify"): ("config verify ./workspace",),
    ("download",): (
        "download Qwen/Qwen2.5-0.5B-Instruct",
        "download Shanghai_AI_Laboratory/internlm-chat-7b --source modelscope "
        "--local-dir ./internlm-chat-7b",
    ),
}


def add_examples(parser: argparse.ArgumentParser, command: Command = ()) -> None:
    """Put them into the help of `parser` and of the commands below it."""
    if command in EXAMPLES:
        parser.epilog = epilog(EXAMPLES[command])
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, below in subcommands(parser).items():
        add_examples(below, (*command, name))
