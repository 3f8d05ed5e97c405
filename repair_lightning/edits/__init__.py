"""Edits: record formats, the stream of windows, clustering, the ledger and its journal."""
