"""Text from checkpoints: loading, batches, conversations, filling masks."""
