"""`bipdeploy compare`: many methods on one model, each with the same budget and the same text."""
