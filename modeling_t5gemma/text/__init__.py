"""What begins, pads and ends a text: decided when a checkpoint is converted, said by its tokenizer, asked here."""
