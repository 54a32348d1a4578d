"""From a recipe and a config.json to what is known before a run."""
