"""See what a run does: observers that print, write and draw its events."""
