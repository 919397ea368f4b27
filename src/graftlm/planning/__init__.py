"""Memory, time and fit of a run before it is made. See docs/planning.md."""
