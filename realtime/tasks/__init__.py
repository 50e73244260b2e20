"""Background tasks: what takes longer than a request may, and goes on when nobody looks."""
