"""The command line's configuration: what may be set, where it is read from, and what is said of
mistakes."""
