"""What leaves, and how the rest is repaired: maths, no IO."""
