"""One SQLite file of JSON rows."""
