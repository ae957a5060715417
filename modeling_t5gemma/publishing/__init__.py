"""A checkpoint to the Hub: what is proved before, what goes with it, how it gets there."""
