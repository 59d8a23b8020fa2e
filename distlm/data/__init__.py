"""Text from the user's sources to packed blocks of token ids, and the order in which training reads the blocks."""
