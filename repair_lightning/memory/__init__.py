"""The bank of shards and the routers over it."""
