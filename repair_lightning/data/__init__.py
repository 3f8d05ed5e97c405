"""Records, the stream, clustering and the ledger."""
