"""Files, folders and the Hub: what goes in and out whole or not at all."""
