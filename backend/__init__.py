"""Everything below the page: engine, text, server, command line. See README.md for the map."""
