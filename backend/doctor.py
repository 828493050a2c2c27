"""What this machine can run, in plain words: for newcomers, and to send along with a question."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "triton", "gradio", "fastapi", "transformers", "safetensors", "tokenizers",
            "sentencepiece", "tiktoken")  # fmt: skip
# Bytes of a weight, by how a model is stored; scales and zeros of groups of 128 included.
WEIGHTS = {"16 bits": 2.0, "8 bits (W8A8)": 1.01, "4 bits (AWQ)": 0.53}
IN_FLOAT32 = {"16 bits": 4.0, "8 bits (W8A8)": 1.01}  # 4 bits are unpacked
# Of memory, what a model's weights may take, so that there is room for its KV cache and steps.
SHARE = 0.8
SETTINGS = ("LMDESK_HOME", "HF_HUB_OFFLINE", "LMDEPLOY_USE_MODELSCOPE", "CUDA_VISIBLE_DEVICES",
            "OMP_NUM_THREADS")  # fmt: skip
SECRETS = ("HF_TOKEN", "HF_ENDPOINT", "HTTPS_PROXY")  # addresses may have a password in them
PORTS = {6006: "the page", 23333: "the API"}


@dataclass(frozen=True)
class GPU:
    """A GPU: memory in bytes, and compute capability."""

    name: str
    memory: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """What the report is about, as found by `examine`.

    Attributes:
        memory, memory_free, disk_free: bytes; the disk's where downloaded models go.
        bfloat16, int8: whether the CPU has instructions for products of such numbers.
        gpu_problem: why a GPU that is there cannot be used.
        settings: environment variables that are set; of secrets, only that they are.
        busy_ports: of `PORTS`.
    """

    python: str = ""
    system: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    cores: int = 1
    memory: int = 0
    memory_free: int = 0
    bfloat16: bool = False
    int8: bool = False
    gpus: tuple[GPU, ...] = ()
    gpu_problem: str = ""
    models_folder: str = ""
    disk_free: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)
    busy_ports: tuple[int, ...] = ()


def examine() -> Machine:
    """Look at this machine; loads nothing onto a GPU, and asks nobody on the network."""
    import psutil
    import torch

    from backend.hub.library import models_dir

    gpus, problem = _gpus()
    memory, folder = psutil.virtual_memory(), models_dir()
    instructions = torch.cpu.get_capabilities()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return Machine(
        python=f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        packages={name: _version(name) for name in PACKAGES},
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (
            os.cpu_count() or 1),
        memory=memory.total,
        memory_free=memory.available,
        bfloat16=bool(instructions.get("avx512_bf16")),
        int8=any(instructions.get(name) for name in ("amx_int8", "avx512_vnni", "avx_vnni")),
        gpus=gpus,
        gpu_problem=problem,
        models_folder=str(folder),
        disk_free=shutil.disk_usage(there).free,
        settings={name: os.environ[name] for name in SETTINGS if name in os.environ}
        | {name: "set" for name in SECRETS if name in os.environ},
        busy_ports=tuple(port for port in PORTS if _is_busy(port)),
    )


def report(machine: Machine | None = None) -> str:
    """The report as text; of this machine unless said otherwise."""
    lines = _lines(machine or examine())
    return "\n".join(lines) + "\n"


def _lines(machine: Machine) -> Iterator[str]:
    yield "This machine"
    yield f"  system     {machine.system}; {machine.python}"
    yield f"  processor  {machine.cores} cores; {_instructions(machine)}"
    yield f"  memory     {_gb(machine.memory)}, {_gb(machine.memory_free)} of it free"
    for number, gpu in enumerate(machine.gpus):
        major, minor = gpu.capability
        yield (f"  GPU {number}      {gpu.name}, {_gb(gpu.memory)}, compute capability "
               f"{major}.{minor}")
    if not machine.gpus:
        yield f"  GPU        none{': ' + machine.gpu_problem if machine.gpu_problem else ''}"
    yield f"  disk       {_gb(machine.disk_free)} free for models in {machine.models_folder}"
    yield "  packages   " + ", ".join(f"{k} {v}" for k, v in machine.packages.items())
    if machine.settings:
        yield "  settings   " + ", ".join(f"{k}={v}" for k, v in machine.settings.items())
    yield ""
    yield "What it can run"
    yield from (f"  - {sentence}" for sentence in verdicts(machine))


def verdicts(machine: Machine) -> Iterator[str]:
    """What can be run, a sentence each."""
    yield "The bundled model, page, API and terminal: python app.py"
    able = [gpu for gpu in machine.gpus if gpu.capability >= (8, 0)]
    if able:
        smallest, count = min(gpu.memory for gpu in able), len(able)
        yield f"On one GPU, models of up to {_sizes(smallest)}."
        if count > 1:
            ranks = 1 << (count.bit_length() - 1)
            yield f"On {ranks} GPUs together (--tp {ranks}), up to {_sizes(ranks * smallest)}."
    elif machine.gpus:
        yield ("The GPU is older than compute capability 8.0 (NVIDIA Ampere), which the kernels "
               "need: use --device cpu.")
    else:
        sizes = WEIGHTS if machine.bfloat16 else IN_FLOAT32
        yield f"On the processor, models of up to {_sizes(machine.memory_free, sizes)}."
        if not machine.bfloat16:
            yield ("It has no instructions for bfloat16, so they run in float32, which takes "
                   "twice the memory; --dtype bfloat16 takes half of that, and more time.")
        if not machine.int8:
            yield "W8A8 models run, but slowly: it has no instructions for int8 products."
    yield ("Quantizing: larger models than these, as they go through memory layer by layer: "
           "python app.py lite auto_awq")
    if machine.packages.get("triton") == "not installed" and machine.gpus:
        yield "Triton is not installed, so the GPU cannot be used: install requirements.txt."
    for port in machine.busy_ports:
        yield (f"Port {port}, of {PORTS[port]}, is in use by another program: choose one with "
               "--server-port.")
    if machine.disk_free < 20e9:
        yield (f"The disk has {_gb(machine.disk_free)} free; a 7B model in 16 bits takes 15 GB. "
               "Set LMDESK_HOME to a folder on a larger one.")


def _sizes(memory: int, sizes: Mapping[str, float] = WEIGHTS) -> str:
    """The largest models by what their weights are stored in."""
    return ", ".join(
        f"{SHARE * memory / size / 1e9:.1f}B parameters in {name}" for name, size in sizes.items()
    )


def _instructions(machine: Machine) -> str:
    names = [name for name, there in (("bfloat16", machine.bfloat16), ("int8", machine.int8))
             if there]  # fmt: skip
    return f"instructions for {' and '.join(names)}" if names else "no instructions for bfloat16"


def _gb(number: int) -> str:
    return f"{number / 1e9:.1f} GB"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "there" if importlib.util.find_spec(package) else "not installed"


def _gpus() -> tuple[tuple[GPU, ...], str]:
    """The visible NVIDIA GPUs; and if there are none that torch can use, why."""
    import torch

    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return tuple(GPU(p.name, p.total_memory, (p.major, p.minor)) for p in found), ""
    if torch.version.cuda is None:
        return (), "this torch is a build without CUDA" if Path("/dev/nvidia0").exists() else ""
    if Path("/dev/nvidia0").exists():
        return (), "there is one, but torch cannot use it; its driver may be too old"
    return (), ""


def _is_busy(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
