"""Every op stands under one name and signature in the contract, the reference and each device."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import kernels.cpu
import kernels.reference
from kernels import ops
from kernels.dispatch import reference_only

KERNELS = Path(ops.__file__).parent
NAMES = [
    name
    for name, function in inspect.getmembers(ops, inspect.isfunction)
    if function.__module__ == ops.__name__
]


def arguments(function: ast.FunctionDef) -> list[str]:
    """Names, annotations and defaults, as written."""
    return [ast.unparse(function.args), ast.unparse(function.returns or ast.Constant(None))]


def written_in(folder: Path) -> dict[str, list[str]]:
    """Public functions of a package, read without importing it (a GPU's needs triton)."""
    return {
        node.name: arguments(node)
        for path in folder.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name in NAMES
    }


CONTRACT = {
    node.name: arguments(node)
    for node in ast.parse((KERNELS / "ops.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name in NAMES
}
DEVICES = [name for name in ("cpu", "gpu") if (KERNELS / name).is_dir()]


def test_the_reference_has_every_op():
    assert NAMES and written_in(KERNELS / "reference") == CONTRACT
    assert all(hasattr(kernels.reference, name) for name in NAMES)


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_has_ops_of_the_contract_only(device):
    own = written_in(KERNELS / device)
    assert own and own == {name: CONTRACT[name] for name in own}


def test_every_public_name_of_the_cpu_package_is_an_op():
    assert set(kernels.cpu.__all__) <= set(NAMES)


def test_dispatch_takes_the_devices_own_then_the_reference():
    assert ops.implementation("paged_attention", "cpu") is kernels.cpu.paged_attention
    assert ops.implementation("rms_norm", "meta") is kernels.reference.rms_norm
    with reference_only():
        assert ops.implementation("paged_attention", "cpu") is kernels.reference.paged_attention
    assert ops.implementation("paged_attention", "cpu") is kernels.cpu.paged_attention
