"""What may go wrong with a download, in words; `code` is for the page."""

from __future__ import annotations

from backend.errors import UserError


class HubError(UserError):
    """The hub answers with something that cannot be used."""

    status = 502
    code = "hub_error"


class OfflineError(HubError):
    """The hub cannot be reached, or is given up after many attempts."""

    status = 503
    code = "hub_offline"


class GatedError(HubError):
    """The hub wants a token, another token, or terms to be accepted first."""

    status = 403
    code = "gated_model"


class MissingError(HubError):
    """There is no such model, revision or file."""

    status = 404
    code = "model_not_found"


class DamagedError(HubError):
    """The bytes are not those that the listing promises."""

    code = "damaged_download"


class BusyError(HubError):
    """Another process is downloading the same model."""

    status = 409
    code = "download_in_progress"


class NoSpaceError(HubError):
    """The disk is full, or would be."""

    status = 507
    code = "disk_full"


class DownloadStopped(HubError):
    """The caller's cancel event was set; what was fetched is kept."""

    status = 409
    code = "download_stopped"
