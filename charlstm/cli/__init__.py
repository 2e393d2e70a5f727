"""Code of several launchers: flags, run folders, signals, streams, environment."""
