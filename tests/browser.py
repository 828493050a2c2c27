"""The browser for the page's tests: the one installed, else installed where that is allowed.

    python -m tests.browser     install one if there is none and this user may (Debian, as root)

Without a browser the tests of the page are skipped and say so; with CI set they fail instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PACKAGES = ("chromium", "fonts-noto-cjk")


def find_browser() -> str | None:
    """Path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def may_install() -> bool:
    return shutil.which("apt-get") is not None and os.geteuid() == 0


def main() -> None:
    if find_browser() or not may_install():
        return
    quiet = dict(stdout=subprocess.DEVNULL, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    print("Installing Chromium for the tests of the page ...", flush=True)
    subprocess.run(["apt-get", "update"], check=True, **quiet)
    subprocess.run(
        ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES], check=True, **quiet
    )


if __name__ == "__main__":
    main()
