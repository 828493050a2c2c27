"""What a workspace's config.ini means for the engine, and where each value comes from.

One order of precedence, everywhere: a flag that is given, then config.ini, then the default.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from backend.config import EngineConfig, validate, workspace_kv_cache_dtype
from backend.errors import UserError
from backend.workspace.config_ini import ConfigIni, read_ini
from backend.workspace.keys import KEYS, KV, STEP, SWITCH, Key, known_key
from backend.workspace.layout import CONFIG_INI, Manifest, read_manifest, verify, workspace_of

FIELDS = {f.name: f.default for f in fields(EngineConfig)}
STEP_TOKENS = (16, 1 << 20)  # bounds of max_prefill_token_num


@dataclass(frozen=True)
class Row:
    """A key of config.ini as `config show` has it.

    Attributes:
        value: the effective one.
        source: "config.ini", "default", or the flag that wins over it.
        kind: see Key; "unknown" for a key that is kept, and means nothing here.
        help: for people.
    """

    name: str
    value: str
    source: str
    kind: str
    help: str


def model_name(model: str) -> str | None:
    """The name that a workspace was made under; None if `model` is no workspace."""
    root = workspace_of(model)
    return None if root is None else read_manifest(root).locked["model_name"]


def engine_options(model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """EngineConfig's fields as the config.ini of a workspace has them; none if it is no workspace.

    Args:
        model: folder of a model.
        given: the fields that flags were given for; these are left out, and what contradicts them.

    Raises:
        UserError: config.ini has a value that is not allowed, or one that the weights decide and
            that is not theirs; the small files of the workspace are not those of its manifest; or
            a flag asks for another number of ranks than the weights are parted for.
    """
    root = workspace_of(model)
    if root is None:
        return {}
    verify(root, weights=False)
    manifest = read_manifest(root)
    ini = read_ini(root / CONFIG_INI)
    values = check(ini, manifest)
    ranks = manifest.tensor_para_size
    if given.get("tp", ranks) != ranks:
        raise UserError(
            f"The workspace {root} is made for tp {ranks}, not {given['tp']}.",
            f"Leave --tp out, or convert the model again with --tp {given['tp']}.",
            field="tp",
        )
    options = _options(values, given)
    validate(EngineConfig(**options))
    return {name: value for name, value in options.items() if name not in given}


def check(ini: ConfigIni, manifest: Manifest) -> dict[str, Any]:
    """All known values of a config.ini, of their types.

    Raises:
        UserError: naming the key that is wrong.
    """
    values = {key.name: key.parse(ini.values[key.name]) for key in KEYS.values()
              if key.name in ini.values}  # fmt: skip
    for name, text in manifest.locked.items():
        own = known_key(name).parse(text)
        if values.setdefault(name, own) != own:
            raise UserError(
                f"{ini.path}: {name} is {ini.values[name]}, but the weights were made with {text}.",
                f"Set it back to {text}: the weights decide it.",
                field=name,
            )
    return values


def _options(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Fields of EngineConfig from values of config.ini, but for those that flags decide."""
    options: dict[str, Any] = {}
    for key in KEYS.values():
        if key.name not in values or not key.fields or overriding(key, given):
            continue
        if key.fields in (KV, STEP):
            continue
        (name, *_), value = key.fields, values[key.name]
        if name in FIELDS:
            options[name] = bool(value) if key.choices == SWITCH else value
        elif value != key.default:  # never taken and ignored
            raise UserError(
                f"config.ini: {key.name} {value} is not supported yet.",
                f"Set it to {key.default}.",
                field=key.name,
            )
    if not set(KV) & set(given):
        named = values.get("kv_cache_dtype", "auto")
        numbered = workspace_kv_cache_dtype(values.get("quant_policy", 0))
        options["kv_cache_dtype"] = numbered if named == "auto" else named
    if not set(STEP) & set(given):
        tokens = step_tokens(values, options)
        if tokens is not None:
            options[STEP[0]] = tokens
    return options


def step_tokens(values: Mapping[str, Any], options: Mapping[str, Any]) -> int | None:
    """max_prefill_token_num as LMDeploy's two keys say it; None if neither is there."""
    own = values.get("num_tokens_per_iter", 0)
    if not own:
        own = values.get("max_context_token_num")
        if own is None:
            return None
        if own <= options.get("max_batch_size", values.get("max_batch_size", 0)):
            own *= options.get("session_len") or values["max_position_embeddings"]
    low, high = STEP_TOKENS
    return min(max(own, low), high)


def overriding(key: Key, given: Collection[str]) -> str | None:
    """The flag that wins over a key; None if none does."""
    found = next((name for name in key.fields if name in given), None)
    return None if found is None else "--" + found.replace("_", "-")


def show(root: Path, given: Mapping[str, Any]) -> list[Row]:
    """Every key of the workspace `root`: its effective value, and where that comes from.

    Raises:
        UserError: as `engine_options`.
    """
    engine_options(str(root), given)
    ini = read_ini(root / CONFIG_INI)
    values = check(ini, read_manifest(root))
    rows = []
    for key in KEYS.values():
        flag = overriding(key, given)
        value, source = values.get(key.name), "config.ini"
        if flag is not None and not key.locked:
            value, source = given[flag[2:].replace("-", "_")], flag
        elif key.name not in ini.values:
            value = value if key.locked else FIELDS.get(key.name, key.default)
            source = "manifest.json" if key.locked else "default"
        text = "none" if value is None else key.show(value)
        rows.append(Row(key.name, text, source, key.kind, key.help))
    rows += [
        Row(name, text, "config.ini", "unknown", "not known here")
        for name, text in ini.values.items() if name not in KEYS
    ]  # fmt: skip
    return rows


def edit(root: Path, changes: Mapping[str, str]) -> ConfigIni:
    """Write new values into a workspace's config.ini; all of them, or none.

    Raises:
        UserError: a key is not known or locked, a value is not allowed, or the file cannot be
            written.
    """
    path = root / CONFIG_INI
    ini, manifest = read_ini(path), read_manifest(root)
    for name, text in changes.items():
        key = known_key(name)
        if key.locked and key.parse(text) != key.parse(manifest.locked[name]):
            raise UserError(
                f"{name} cannot be changed: the weights decide it.",
                "Convert the model again with --tp." if name == "tensor_para_size" else
                "It is an attribute of the model.",
                field=name,
            )
        ini.set(name, text)
    values = check(ini, manifest)
    validate(EngineConfig(**_options(values, ())))
    ini.write()
    return ini
