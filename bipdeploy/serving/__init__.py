"""Running exported models in vLLM: finding it, starting its server, comparing engines."""
