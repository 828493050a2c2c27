"""`serve proxy`: one address for many api_servers."""
