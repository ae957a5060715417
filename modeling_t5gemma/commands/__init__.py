"""The commands of ``t5gemma``, one module each."""
