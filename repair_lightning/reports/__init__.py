"""Tables and pictures of a run, of a comparison and for W&B."""
