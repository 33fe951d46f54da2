"""The released checkpoints: what there is, where it comes from, how it is fetched and converted."""
