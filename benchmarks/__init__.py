"""Speed and memory of Hope."""
