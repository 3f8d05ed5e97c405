"""Packs: an edited model on the disk, on the hub, and exported for other tools."""
