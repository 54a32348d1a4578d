"""`bipdeploy sweep`: many whole runs of one recipe, on Ray Tune, and which of them pay."""
