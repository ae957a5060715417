"""What a model costs to run: calculated from its config, measured, and set against its quality."""
