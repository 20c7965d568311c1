"""The command line: one thin file a verb, which parses, builds, calls, and ends with an exit code."""
