"""How events answer what a person did wrong: a sentence in a toast."""

from __future__ import annotations

import logging
from html import escape

import gradio as gr

from backend.errors import UserError
from ui.i18n import t

logger = logging.getLogger(__name__)


def sentence(error: BaseException, locale: str) -> str:
    """What a person is told; what only a programmer understands is logged."""
    if isinstance(error, UserError):
        return str(error)
    logger.error("An event of the page failed", exc_info=error)
    return t("error.internal", locale)


def warn(error: BaseException, locale: str) -> None:
    """`sentence` as a toast."""
    gr.Warning(escape(sentence(error, locale)))
