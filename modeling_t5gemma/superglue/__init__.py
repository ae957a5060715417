"""SuperGLUE (arXiv 1905.00537) with classification heads, as in "Encoder-Decoder Gemma" (arXiv 2504.06225)."""
