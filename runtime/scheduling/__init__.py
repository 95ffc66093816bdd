"""Which request gets which slot when, and how much of its prompt is read: integers only."""
