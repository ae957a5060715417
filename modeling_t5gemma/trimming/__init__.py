"""A smaller vocabulary: the tokens that a task needs, with the rows of the embedding that are theirs."""
