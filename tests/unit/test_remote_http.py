"""URLs as people write them, and those that must never be asked."""

from __future__ import annotations

import pytest

from backend.errors import UserError
from backend.remote_http import is_loopback_url, normalise_url


@pytest.mark.parametrize(("text", "url", "loopback"), [
    ("127.0.0.1:23333", "http://127.0.0.1:23333", True),
    (" http://0.0.0.0:23333/ ", "http://127.0.0.1:23333", True),
    ("http://[::]:5", "http://[::1]:5", True), ("localhost:80", "http://localhost:80", True),
    ("HTTPS://Host.Example/v1/", "https://host.example", False),
    ("http://10.0.0.7:1/lab/v1", "http://10.0.0.7:1/lab", False),
    ("http://[::FFFF:127.0.0.1]:7", "http://127.0.0.1:7", True),
    ("http://[::ffff:0.0.0.0]:7", "http://127.0.0.1:7", True),
    ("http://[0:0::1]:7/v1", "http://[::1]:7", True),
    ("http://[2001:DB8::1]:7", "http://[2001:db8::1]:7", False),
    ("http://127.0.0.1.example.org", "http://127.0.0.1.example.org", False),
])
def test_urls(text: str, url: str, loopback: bool) -> None:
    assert normalise_url(text) == url == normalise_url(url)
    assert is_loopback_url(url) is loopback


@pytest.mark.parametrize("text", [
    "", "not a url", "http://", "ftp://host", "file:///etc/passwd", "javascript:alert(1)", "h:port",
    "http://h:0", "http://h:65536", "http://[::1", "http://h?q=1", "http://h#f", "http://h/a/../b",
    "http://user:secret@h:99999", "http://u@h", "http://h\\@x", "http://h\n.x", "http://a%2eb",
    "http://ℹ.com", "http://169.254.169.254/latest", "http://[fe80::1]", "127.1:80",
    "http://2852039166", "http://0xa9fea9fe", "http://0x7f.1:80", "http://0", "file://127.0.0.1/v1",
    "http://127.0.0.1:-1", "http://127.0.0.1:99999999999", "http://[fe80::1%25eth0]", "//h", "/v1",
    "http://0251.0376.0251.0376", "http://-x",
    "http://[::ffff:169.254.169.254]", "http://metadata.google.internal.", "http://224.0.0.1",
])
def test_urls_that_are_none(text: str) -> None:
    with pytest.raises(UserError) as caught:
        normalise_url(text)
    assert "secret" not in str(caught.value) and caught.value.field == "url"
