"""What a model is run with, and where each value comes from.

A workspace has its config.ini. What is set for a plain folder, which may be read-only or shared by
many, is kept in the user's data directory, in a file of EngineConfig's fields. One order of
precedence for both: a flag that is given, then the file, then the default.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from backend.config import EngineConfig, validate, workspace_kv_cache_dtype
from backend.data_dir import data_dir
from backend.errors import UserError
from backend.workspace.config_ini import SECTION, ConfigIni, read_ini
from backend.workspace.keys import ENGINE_KEYS, KEYS, KV, STEP, SWITCH, Key, known_key
from backend.workspace.layout import CONFIG_INI, Manifest, read_manifest, verify, workspace_of

FIELDS = {f.name: f.default for f in fields(EngineConfig)}
STEP_TOKENS = (16, 1 << 20)  # bounds of max_prefill_token_num
OWN_SECTION = "engine"
MODEL_S = ("session_len", "rope_scaling_factor", "use_logn_attn")  # the model has the defaults


@dataclass(frozen=True)
class Row:
    """A key of a settings' file as `config show` has it.

    Attributes:
        value: the effective one.
        source: "config.ini", "settings" (a plain folder's), "default", "model" (what it says
            itself is the default), "manifest.json", or the flag that wins over it.
        kind: see Key; "unknown" for a key that is kept, and means nothing here.
        help: for people.
    """

    name: str
    value: str
    source: str
    kind: str
    help: str


@dataclass(frozen=True)
class SettingsFile:
    """The file that a model's settings are in; it may not exist yet where `manifest` is None.

    Attributes:
        path: of the file.
        keys: what it may say.
        manifest: of the workspace; None for a plain folder.
    """

    path: Path
    keys: Mapping[str, Key]
    manifest: Manifest | None
    model: str

    @property
    def name(self) -> str:
        """What messages and `config show` call it."""
        return "settings" if self.manifest is None else "config.ini"

    def read(self) -> ConfigIni:
        """The file; one without values where there is none yet.

        Raises:
            UserError: it cannot be read, or is no such file.
        """
        if self.manifest is not None or self.path.exists():
            return read_ini(self.path, SECTION if self.manifest else OWN_SECTION)
        return self.parse("")

    def parse(self, text: str) -> ConfigIni:
        """The file with `text` in it; without text, as it begins."""
        if self.manifest is not None:
            return ConfigIni(text, self.path)
        about = f"# What LMDesk runs {json.dumps(self.model)} with; docs/configuration.md"
        return ConfigIni(text or f"{about}\n[{OWN_SECTION}]\n", self.path, OWN_SECTION)

    def check(self, ini: ConfigIni) -> dict[str, Any]:
        """All known values of the file, of their types.

        Raises:
            UserError: naming the key that is wrong.
        """
        values = {key.name: key.parse(ini.values[key.name]) for key in self.keys.values()
                  if key.name in ini.values}  # fmt: skip
        for name, text in self.locked.items():
            own = known_key(name).parse(text)
            if values.setdefault(name, own) != own:
                raise UserError(
                    f"{ini.path}: {name} is {ini.values[name]}, but the weights were made with "
                    f"{text}.",
                    f"Set it back to {text}: the weights decide it.",
                    field=name,
                )
        return values

    @property
    def locked(self) -> dict[str, str]:
        """Values of the keys that the weights decide."""
        return {} if self.manifest is None else self.manifest.locked

    def options(self, values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """EngineConfig's fields by the file's `values`, but for those that flags decide.

        Raises:
            UserError: a value asks for what the engine cannot do, or contradicts another.
        """
        if self.manifest is None:
            options = {name: value for name, value in values.items()
                       if not overriding(self.keys[name], given)}  # fmt: skip
        else:
            options = _workspace_options(values, given)
        validate(EngineConfig(**options))
        return options


def settings_of(model: str | os.PathLike[str]) -> SettingsFile:
    """Where the settings of the model in a folder are.

    Raises:
        UserError: the workspace has no manifest, or the user no home directory.
    """
    root = workspace_of(model)
    if root is not None:
        return SettingsFile(root / CONFIG_INI, KEYS, read_manifest(root), str(root))
    folder = os.path.realpath(os.path.expanduser(model))
    mark = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    path = data_dir() / "settings" / f"{os.path.basename(folder)}-{mark}.ini"
    return SettingsFile(path, ENGINE_KEYS, None, folder)


def model_name(model: str) -> str | None:
    """The name that a workspace was made under; None if `model` is no workspace."""
    root = workspace_of(model)
    return None if root is None else read_manifest(root).locked["model_name"]


def engine_options(model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """EngineConfig's fields as the file of a model's settings has them; none if there is no file.

    Args:
        model: folder of a model.
        given: the fields that flags were given for; these are left out, and what contradicts them.

    Raises:
        UserError: the file has a value that is not allowed, or one that the weights decide and
            that is not theirs; the small files of the workspace are not those of its manifest; or
            a flag asks for another number of ranks than the weights are parted for.
    """
    root = workspace_of(model)
    if root is not None:
        verify(root, weights=False)
    try:
        file = settings_of(model)
    except UserError:
        if root is not None:
            raise
        return {}  # a user without a home has set nothing
    ini = file.read()
    values = file.check(ini)
    if file.manifest is not None:
        ranks = file.manifest.tensor_para_size
        if given.get("tp", ranks) != ranks:
            raise UserError(
                f"The workspace {root} is made for tp {ranks}, not {given['tp']}.",
                f"Leave --tp out, or convert the model again with --tp {given['tp']}.",
                field="tp",
            )
    options = file.options(values, given)
    return {name: value for name, value in options.items() if name not in given}


def _workspace_options(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of EngineConfig from values of config.ini, but for those that flags decide."""
    options: dict[str, Any] = {}
    for key in KEYS.values():
        if key.name not in values or not key.fields or overriding(key, given):
            continue
        if key.fields in (KV, STEP):
            continue
        (name, *_), value = key.fields, values[key.name]
        options[name] = bool(value) if key.choices == SWITCH else value
    if not set(KV) & set(given):
        named = values.get("kv_cache_dtype", "auto")
        numbered = workspace_kv_cache_dtype(values.get("quant_policy", 0))
        options["kv_cache_dtype"] = numbered if named == "auto" else named
    if not set(STEP) & set(given):
        tokens = step_tokens(values, {**options, **given})
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
        if own <= options.get("max_batch_size", EngineConfig.max_batch_size):
            own *= options.get("session_len") or values["max_position_embeddings"]
    low, high = STEP_TOKENS
    return min(max(own, low), high)


def overriding(key: Key, given: Collection[str]) -> str | None:
    """The flag that wins over a key; None if none does."""
    found = next((name for name in key.fields if name in given), None)
    return None if found is None else "--" + found.replace("_", "-")


def show(model: str | os.PathLike[str], given: Mapping[str, Any]) -> list[Row]:
    """Every key of a model's settings: its effective value, and where that comes from.

    Raises:
        UserError: as `engine_options`.
    """
    engine_options(str(model), given)
    file = settings_of(model)
    ini = file.read()
    return rows(file, ini, given)


def rows(file: SettingsFile, ini: ConfigIni, given: Mapping[str, Any]) -> list[Row]:
    """The same for a file as it is, or as it would be.

    Raises:
        UserError: as `SettingsFile.check`.
    """
    values = file.check(ini)
    found = []
    for key in file.keys.values():
        flag = overriding(key, given)
        value, source = values.get(key.name), file.name
        if flag is not None and not key.locked:
            value, source = given[flag[2:].replace("-", "_")], flag
        elif key.name not in ini.values:
            value = value if key.locked else FIELDS.get(key.name, key.default)
            source = "manifest.json" if key.locked else "default"
            own = model_s_own(file.model) if value is None and key.name in MODEL_S else {}
            if own:
                value, source = own[key.name], "model"
        text = "none" if value is None else _shown(key, value)
        found.append(Row(key.name, text, source, key.kind, key.help))
    return found + [
        Row(name, text, file.name, "unknown", "not known here")
        for name, text in ini.values.items() if name not in file.keys
    ]  # fmt: skip


def model_s_own(model: str) -> dict[str, Any]:
    """What MODEL_S are where nobody sets them; empty if the model cannot tell."""
    from backend.models.long_context import LongContext
    from backend.models.registry import read_model_config

    try:
        config = read_model_config(model)
    except UserError:
        return {}  # told when it is loaded
    return {"session_len": config.max_position_embeddings, **asdict(LongContext.declared(config))}


def _shown(key: Key, value: Any) -> str:
    """A flag of another type may stand in a key's place, such as int8 for quant_policy."""
    return key.show(value) if isinstance(value, (key.type, bool)) else str(value)
