"""Model cards: the template that `hope release` fills in, and a directory for each model that has one."""
