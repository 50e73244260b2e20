"""Where sessions live: one narrow interface, and its implementations."""
