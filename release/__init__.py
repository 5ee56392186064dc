"""A model directory becomes a release: checked, described in a card, sealed with checksums, and pushed to the hub."""

from .release import Release, release, render_again, write_card


__all__ = ["Release", "release", "render_again", "write_card"]
