"""Post-training: supervised fine-tuning, preferences, rewards, classification."""
