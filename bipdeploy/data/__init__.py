"""Text and token windows: where calibration and test text comes from."""
