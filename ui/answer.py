"""How events answer what a person did wrong: a sentence in a toast.

An event is a request of its own. Handlers that catch every Exception, not only UserError, do so for
what they have to leave behind on the page: past them Gradio shows "Error", and changes no output.
"""

from __future__ import annotations

import logging
from html import escape

import gradio as gr

from backend.errors import UserError
from ui.i18n import DEFAULT_LOCALE, catalogs, t
from ui.sentences import error_text

logger = logging.getLogger(__name__)


def sentence(error: BaseException, locale: str) -> str:
    """What a person is told; what only a programmer understands is logged."""
    if isinstance(error, UserError):
        key = f"error.code.{error.code}"
        return t(key, locale) if key in catalogs()[DEFAULT_LOCALE] else error_text(error, locale)
    logger.error("An event of the page failed", exc_info=error)
    return t("error.internal", locale)


def warn(error: BaseException, locale: str) -> str:
    """`sentence` as a toast; returns it, for who shows it elsewhere too."""
    words = sentence(error, locale)
    gr.Warning(escape(words))
    return words


def no_success() -> gr.Error:
    """To be raised by an event that has told why it does not do what it is for: what waits for its
    success does not follow."""
    return gr.Error(visible=False, print_exception=False)
