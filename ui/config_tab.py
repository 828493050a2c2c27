"""The config tab: a model's settings as a form, with what they mean, before and after.

The form shows a file: a workspace's config.ini, or what was set for a plain folder. All that is
decided here is decided again by `backend.workspace.editor` when it is saved.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Iterable, Mapping
from html import escape
from typing import Any

import gradio as gr

from backend.config import EngineConfig
from backend.engine_manager import RepliesOpenError
from backend.errors import UserError
from backend.footprint import Fit, Footprints, fit
from backend.services import Services
from backend.workspace.config_ini import ConfigIni
from backend.workspace.editor import Draft, changes_of, digest, draft, save, undo, undos
from backend.workspace.keys import ENGINE_KEYS, KEYS, Key
from backend.workspace.settings import SettingsFile, model_s_own, rows, settings_of
from ui import config_view, forms
from ui.answer import sentence, warn
from ui.i18n import label, locale_of, t
from ui.roles import Page

MAIN = ("quant_policy", "kv_cache_dtype", "rope_scaling_factor", "use_logn_attn", "max_batch_size",
        "session_len", "cache_max_entry_count")
KINDS: dict[str, Mapping[str, Key]] = {"ini": KEYS, "engine": ENGINE_KEYS}

Form = dict[Any, Any]  # component -> value
Updates = dict[Any, Any]


class ConfigTab:
    """Builds the tab's components inside the current layout and wires them."""

    def __init__(self, services: Services) -> None:
        assert services.engines is not None and services.library is not None
        self.engines, self.library = services.engines, services.library
        self.footprints = Footprints()
        self.inputs: dict[str, dict[str, Any]] = {}
        with gr.Row(elem_id="config-page", elem_classes="lmd-page"):
            with gr.Column(scale=5, elem_id="config-form", elem_classes="lmd-form"):
                self._build_head()
                self.groups = {kind: self._build_form(kind) for kind in KINDS}
            with gr.Column(scale=3, min_width=320, elem_id="config-side", elem_classes="lmd-side"):
                self._build_side()
        self.form = {self.model, self.seen,
                     *(field for kind in self.inputs.values() for field in kind.values())}
        self._wire()

    # Layout

    def _build_head(self) -> None:
        with gr.Row(elem_id="config-head"):
            self.model = gr.Dropdown(
                [], label=label("settings.model"), elem_id="config-model", filterable=True)
            self.reload = gr.Button(label("settings.reload"), elem_id="config-reload", size="sm")
        # The style sheet shows it as long as nothing is told about the file.
        gr.Markdown(label("settings.reading"), elem_id="config-reading", elem_classes="lmd-quiet")
        self.about = gr.HTML(elem_id="config-about", apply_default_css=False)
        # Of the file as the form shows it; the server keeps it, a session each.
        self.seen = gr.State("")

    def _build_form(self, kind: str) -> gr.Column:
        keys = KINDS[kind]
        parts: dict[str, list[Key]] = {"main": [], "more": [], "legacy": [], "locked": []}
        for key in sorted(keys.values(), key=lambda key: MAIN.index(key.name)
                          if key.name in MAIN else len(MAIN)):
            part = "locked" if key.locked else "legacy" if key.kind == "legacy" else (
                "main" if key.name in MAIN else "more")
            parts[part].append(key)
        self.inputs[kind] = {}
        with gr.Column(visible=False, elem_id=f"config-{kind}") as column:
            self._build_inputs(kind, parts["main"])
            for part in ("more", "locked", "legacy"):
                if parts[part]:
                    with gr.Accordion(label(f"settings.part.{part}"), open=False,
                                      elem_id=f"config-{kind}-{part}"):
                        if part != "more":
                            gr.Markdown(label(f"settings.why.{part}"), elem_classes="lmd-why")
                        self._build_inputs(kind, parts[part])
        return column

    def _build_inputs(self, kind: str, keys: Iterable[Key]) -> None:
        with gr.Row(elem_classes="lmd-grid"):
            for key in keys:
                self.inputs[kind][key.name] = forms.setting_input(key, f"config-{kind}-{key.name}")

    def _build_side(self) -> None:
        html: dict[str, Any] = {"apply_default_css": False}
        gr.Markdown(label("settings.memory.title"), elem_classes="lmd-title")
        self.memory = gr.HTML(elem_id="config-memory", **html)
        gr.Markdown(label("settings.changes"), elem_classes="lmd-title")
        self.diff = gr.HTML(elem_id="config-diff", **html)
        with gr.Row(elem_classes="lmd-actions"):
            self.save = gr.Button(label("settings.save"), elem_id="config-save", size="sm")
            self.apply = gr.Button(
                label("settings.apply"), elem_id="config-apply", variant="primary", size="sm")
            self.undo = gr.Button(label("settings.undo"), elem_id="config-undo", size="sm")
        self.force = gr.Button(
            label("settings.force"), elem_id="config-force", variant="stop", size="sm",
            visible=False)
        self.state = gr.HTML(elem_id="config-state", **html)

    def _wire(self) -> None:
        event: dict[str, Any] = {
            "show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
        fields = [field for kind in self.inputs.values() for field in kind.values()]
        outputs = [self.about, self.seen, *self.groups.values(), *fields, *self._side()]
        gr.on([self.model.change, self.reload.click], self.on_choose, [self.model], outputs,
              **event)
        gr.on([field.input for field in fields if field.interactive], self.on_edit, self.form,
              self._side(), trigger_mode="always_last", **event)
        self.save.click(self.on_save, self.form, outputs, **event)
        self.apply.click(self.on_apply, self.form, outputs, **event)
        self.force.click(self.on_force, self.form, outputs, **event)
        self.undo.click(self.on_undo, self.form, outputs, **event)

    def _side(self) -> list[Any]:
        return [self.memory, self.diff, self.save, self.apply, self.undo, self.force, self.state]

    def wire_opening(self, page: Page, tab: gr.Tab) -> None:
        """List the models; the served one is chosen first."""
        tab.select(self.on_open, [self.model], [self.model], show_progress="hidden",
                   concurrency_limit=None, api_visibility="private")

    # Events

    async def on_open(self, chosen: str | None) -> Any:
        models = await asyncio.to_thread(self.library.models)
        choices = [(model.name, str(model.path)) for model in models]
        served = self._served()
        paths = [path for _, path in choices]
        if chosen not in paths:
            chosen = next((p for p in paths if os.path.realpath(p) == served), paths[0])
        return gr.update(choices=choices, value=chosen)

    async def on_choose(self, model: str, request: gr.Request) -> AsyncGenerator[Updates, None]:
        locale = locale_of(request)
        try:
            file = self._file(model)
            # Whoever is here first has torch loaded, which takes seconds: not of everybody's.
            yield await asyncio.to_thread(self._shown, file, locale)
            yield await self._meant(file, {}, locale)
        except UserError as error:
            yield self._hidden(error, locale)

    async def on_edit(self, form: Form, request: gr.Request) -> AsyncGenerator[Updates, None]:
        locale = locale_of(request)
        try:
            file = self._file(form[self.model])
            made = draft(file, self._changes(file, form))
        except UserError as error:
            yield {self.diff: config_view.problem_html(sentence(error, locale)),
                   **self._buttons(None, may_save=False)}
            return
        yield {self.diff: config_view.diff_html(made.diff, locale),
               **self._buttons(file, may_save=made.changed)}
        yield await self._meant(file, self._changes(file, form), locale)

    async def on_save(self, form: Form, request: gr.Request) -> AsyncGenerator[Updates, None]:
        locale = locale_of(request)
        saved = self._save(form, locale)
        if saved is not None:
            yield saved
            yield await self._meant(self._file(form[self.model]), {}, locale)

    async def on_apply(self, form: Form, request: gr.Request) -> AsyncGenerator[Updates, None]:
        async for updates in self._apply(form, locale_of(request), force=False):
            yield updates

    async def on_force(self, form: Form, request: gr.Request) -> AsyncGenerator[Updates, None]:
        async for updates in self._apply(form, locale_of(request), force=True):
            yield updates

    async def on_undo(self, form: Form, request: gr.Request) -> AsyncGenerator[Updates, None]:
        locale = locale_of(request)
        try:
            file = self._file(form[self.model])
            diff = undo(file)
            yield self._shown(file, locale) | {
                self.diff: config_view.diff_html(diff, locale),
                self.state: self._said("settings.undone", locale)}
            yield await self._meant(file, {}, locale)
        except UserError as error:
            warn(error, locale)

    # What they have in common

    def _file(self, model: str) -> SettingsFile:
        """The settings of a model that this page may offer."""
        return settings_of(self.library.checked(model))

    def _served(self) -> str:
        current = self.engines.current
        return os.path.realpath(current.engine.config.model) if current else ""

    def _given(self, file: SettingsFile) -> dict[str, Any]:
        """What wins over the file: what the served model was loaded with, or the command line."""
        request = self.engines.request
        if request is not None and os.path.realpath(file.model) == self._served():
            return dict(request.options)
        return dict(self.engines.defaults)

    def _changes(self, file: SettingsFile, form: Form) -> dict[str, str]:
        kind = _kind(file)
        values = {name: form[field] for name, field in self.inputs[kind].items()}
        return changes_of(file, file.read(), values)

    def _save(self, form: Form, locale: str) -> Updates | None:
        """Save what the form says; None, and a toast, if that is refused."""
        try:
            file = self._file(form[self.model])
            made: Draft = save(file, self._changes(file, form), form[self.seen] or "none")
        except UserError as error:
            warn(error, locale)
            return None
        return self._shown(file, locale) | {
            self.diff: config_view.diff_html(made.diff, locale),
            self.state: self._said("settings.saved" if made.changed else "settings.no_changes",
                                   locale)}

    async def _apply(
        self, form: Form, locale: str, *, force: bool
    ) -> AsyncGenerator[Updates, None]:
        """Save, then load the model with what was saved."""
        saved = self._save(form, locale)
        if saved is None:
            return
        yield saved | {self.state: self._said("settings.loading", locale)}
        folder = self.library.checked(form[self.model])
        try:
            if os.path.realpath(folder) == self._served():
                chat = await self.engines.restart(force=force)
            else:
                chat = await self.engines.load(str(folder), force=force)
            await chat.engine.wait_ready()
        except RepliesOpenError as error:
            yield {self.force: gr.update(visible=True), self.state: config_view.problem_html(
                t("settings.replies_open", locale, count=error.count))}
            return
        except UserError as error:
            warn(error, locale)
            yield {self.state: config_view.problem_html(sentence(error, locale))}
            return
        file = self._file(form[self.model])
        yield self._shown(file, locale) | {self.state: self._said("settings.applied", locale)}
        yield await self._meant(file, {}, locale)

    def _shown(self, file: SettingsFile, locale: str) -> Updates:
        """The form as the file is."""
        kind = _kind(file)
        ini = file.read()
        found = {row.name: row for row in rows(file, ini, self._given(file))}
        fields = self.inputs[kind]
        updates: Updates = {
            field: gr.update(
                value=self._value(file, key, ini),
                info=config_view.note(key, found[name], locale),
                elem_classes=["lmd-setting", f"lmd-from-{config_view.source_kind(found[name])}",
                              *(["lmd-locked"] if key.locked else [])])
            for name, field in fields.items() for key in (file.keys[name],)
        }
        here = file.path if file.path.exists() else None
        about = t("settings.about.file" if here else "settings.about.no_file", locale,
                  path=str(file.path))
        return updates | {
            self.about: f'<p class="lmd-quiet">{escape(about)}</p>',
            self.seen: digest(ini.text if here else ""),
            self.groups[kind]: gr.update(visible=True),
            **{self.groups[other]: gr.update(visible=False) for other in KINDS if other != kind},
            self.diff: config_view.diff_html("", locale),
            self.state: "",
            **self._buttons(file, may_save=False),
        }

    @staticmethod
    def _value(file: SettingsFile, key: Key, ini: ConfigIni) -> Any:
        text = ini.values.get(key.name, file.locked.get(key.name))
        if text is None and key.is_switch:  # a box is ticked or not: by what counts without it
            own = model_s_own(file.model).get(key.name)
            text = None if own is None else key.show(own)
        return forms.setting_value(key, text)

    def _buttons(self, file: SettingsFile | None, *, may_save: bool) -> Updates:
        """`file` None: nothing can be saved as it is typed."""
        return {
            self.save: gr.update(interactive=may_save),
            self.apply: gr.update(interactive=file is not None),
            self.undo: gr.update(interactive=file is not None and undos(file) > 0),
            self.force: gr.update(visible=False),
        }

    def _hidden(self, error: UserError, locale: str) -> Updates:
        """No form, because the file cannot be used."""
        return {
            self.about: config_view.problem_html(sentence(error, locale)),
            self.memory: "", self.diff: "",
            **{group: gr.update(visible=False) for group in self.groups.values()},
            **self._buttons(None, may_save=False),
        }

    async def _meant(
        self, file: SettingsFile, changes: Mapping[str, str], locale: str
    ) -> Updates:
        """What the settings mean in memory, beside what the saved ones mean."""
        try:
            before, after = file.read(), draft(file, changes).ini
            freed = await self._freed()
            now = await self._fit(file, after, freed)
            saved = await self._fit(file, before, freed) if changes else None
        except Exception as error:
            return {self.memory: config_view.problem_html(sentence(error, locale))}
        return {self.memory: config_view.memory_html(now, saved, freed, locale)}

    async def _fit(self, file: SettingsFile, ini: ConfigIni, freed: int) -> Fit:
        given = self._given(file)
        options = {**file.options(file.check(ini), given), **given}
        config = EngineConfig(**{**options, "model": file.model})
        return fit(await self.footprints.of(config), config, freed)

    async def _freed(self) -> int:
        """Bytes that the served model gives back when another, or itself, is loaded."""
        memory = (await self.engines.status()).memory
        if memory is None:
            return 0
        info = self.engines.current.engine.info if self.engines.current else None
        on_cpu = info is not None and info.device == "cpu"
        return memory.engine if on_cpu else memory.weights + memory.kv_cache

    @staticmethod
    def _said(key: str, locale: str) -> str:
        return f'<p class="lmd-said" role="status">{escape(t(key, locale))}</p>'


def _kind(file: SettingsFile) -> str:
    return "engine" if file.manifest is None else "ini"
